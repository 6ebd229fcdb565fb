"""How a branch joins the residual stream: ``x <- a·x + b·f(x)``.

``a = b = 1`` is the standard decoder. Parametrisations that keep variances fixed use ``a² + b² = 1``, and may
normalise the end of the branch instead of its beginning.

With ``delayed``, b's share of the backward pass moves from the end of the branch to its start: the gradient
enters the branch as it is and is multiplied by b where it leaves it. What reaches the stream is the same (a
branch is linear in its gradient), but inside the branch gradients stay at the stream's scale instead of being
b times smaller (Blake et al. 2023, section 5; their weights inside get gradients 1/b times larger, which
AdamW and Lion do not notice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fp8train.layers.factors import scale_backward, scale_forward

NormPlacement = Literal["pre", "branch_end"]


@dataclass(frozen=True)
class ResidualRule:
    """Weights of stream (a) and branch (b), and where b's backward happens."""

    a: float = 1.0
    b: float = 1.0
    delayed: bool = False

    def enter(self, stream: Tensor) -> Tensor:
        """What the branch computes on: the stream itself, its gradient multiplied by b if that is
        ``delayed``; any shape."""
        return scale_backward(stream, self.b) if self.delayed else stream

    def join(self, stream: Tensor, branch: Tensor) -> Tensor:
        """The new stream, ``a·stream + b·branch``; both of one shape, any."""
        if self.a == 1.0 and self.b == 1.0:
            return stream + branch
        if self.delayed:
            return self.a * stream + scale_forward(branch, self.b)
        return torch.add(self.a * stream, branch, alpha=self.b)
