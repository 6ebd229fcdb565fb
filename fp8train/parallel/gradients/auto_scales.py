"""Auto-scaling factors of all FP8 gradients, frozen for a step, as scale state of ``shared_scale``.

:mod:`fp8train.comm.auto_scale` says what the factors are and how they move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.auto_scale import MuController
from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.gradients.scales import GradientScales


@dataclass(frozen=True)
class StepFactors:
    """The auto-scaling factors of one step, and what its sums did with them.

    Attributes:
        mu: FP32 [tensors]; not touched by :meth:`AutoScales.commit`.
        saturated: int64 [tensors], receives the codes at ±max of the reduced tensors that this rank holds.
    """

    mu: Tensor
    saturated: Tensor


class AutoScales(GradientScales):
    """Scale state of ``shared_scale``: one auto-scaling factor mu per FP8 tensor, constant within a step. No
    step is run again: saturation is what moves mu.

    Attributes:
        controller: moves mu.
        step: factors of the running (or last) step.
    """

    name = "shared_scale"

    def __init__(
        self,
        controller: MuController,
        *,
        position: Mapping[str, int],
        numels: Sequence[int],
        counted_over: CountedGroup | None,
    ) -> None:
        """Args:
        controller: has one factor for each of ``position``.
        position: of each tensor, by FQN.
        numels: elements of each whole tensor, whatever part a rank holds.
        counted_over: ranks that hold different parts of the sums; None where each holds all.
        """
        self.controller, self._position, self._counted_over = controller, position, counted_over
        device = controller.mu.device
        self._numels = torch.tensor(list(numels), dtype=torch.int64, device=device)
        self.step = self._frozen()

    def _frozen(self) -> StepFactors:
        return StepFactors(self.controller.mu.clone(), torch.zeros_like(self._numels))

    def positions(self, fqns: Sequence[str]) -> Tensor:
        """Places of these tensors among the factors: int64 [fqns]."""
        return torch.tensor([self._position[fqn] for fqn in fqns], device=self._numels.device)

    def begin_step(self) -> None:
        """Freeze a copy of every mu for the step, with no saturated codes counted yet."""
        self.step = self._frozen()

    def end_step(self) -> None:
        """Add up the counts of ranks that hold different parts."""
        if self._counted_over is not None:
            self._counted_over.all_reduce(self.step.saturated, purpose="saturation")()

    def commit(self) -> None:
        """Move every mu by the step's counts of saturated codes."""
        self.controller.update(self.step.saturated, self._numels)

    def state_tensors(self) -> Mapping[str, Tensor]:
        """The controller's tensors, for checkpoints; they are filled in place."""
        return self.controller.state_tensors()

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """Extremes of mu, and the share of codes at ±max in the last step."""
        mu = self.controller.mu
        nothing = mu.new_full((1,), -torch.inf)
        extremes = torch.stack([torch.cat((nothing, sign * mu)).max() for sign in (-1, 1)])
        shares = torch.stack((self.step.saturated.sum(), self._numels.sum()))
        stages.all_reduce(extremes, purpose="statistics", op=dist.ReduceOp.MAX)()
        stages.all_reduce(shares, purpose="statistics")()
        return {
            "fp8/mu_min": -float(extremes[0]),
            "fp8/mu_max": float(extremes[1]),
            "fp8/gradient_saturated": float(shares[0] / shares[1]),
        }
