"""How a branch joins the residual stream: ``x <- a·x + b·f(x)``.

``a = b = 1`` is the standard decoder. Parametrisations that keep variances fixed use other pairs, and may
normalise the end of the branch instead of its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

NormPlacement = Literal["pre", "branch_end"]


@dataclass(frozen=True)
class ResidualRule:
    """Weights of stream and branch."""

    a: float = 1.0
    b: float = 1.0

    def join(self, stream: Tensor, branch: Tensor) -> Tensor:
        """``a·stream + b·branch``, any equal shapes."""
        if self.a == 1.0 and self.b == 1.0:
            return stream + branch
        return self.a * stream + self.b * branch
