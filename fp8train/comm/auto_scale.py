"""Auto-scaling: the factor μ that keeps FP8 sums inside the format.

A shared scale puts each rank's largest gradient near ±max, so the sum of N ranks may reach N times that.
Multiplying by μ = 1/N before the cast never overflows but loses small values (FP8-LM's *pre-scaling*, Eq. 1);
μ = 1 keeps them and overflows (*post-scaling*, Eq. 2). FP8-LM lets μ follow the data (Eq. 3), one μ per
tensor: where more than 0.001 % of the entries sit at ±max it is halved, else it grows by ``2^(1/1000)``, to
twice its value over 1000 quiet steps.

What the paper leaves open, and what is done here:

* *Where to count.* On the **reduced** tensor: a local payload cannot saturate while μ <= 1. All ranks see the
  same counts (or sum those of their shards), so μ is the same everywhere without being sent.
* *Absolute or relative.* Relative, as MS-AMP's unmerged implementation: "set to 1/2" would raise a small μ.
* *Bounds.* [1/(2N), 1]. Above 1 a rank's own payload would saturate; 1/N fits any sum, and 1/(2N) leaves a
  factor of two for partial sums that were rounded up.
* *Start.* 1/N by default, which cannot overflow by more than rounding. On simulated lognormal gradients its
  SNR is as good as that of 1/√N (MS-AMP's constant, and where its unmerged implementation starts) or better
  at nearly every N and correlation of the ranks.
* *Criterion.* A count is blind to how much was lost: in a tensor of 131,072 entries one clipped outlier is
  below 0.001 %, but may hold most of the energy (it cost 9 dB in a simulation of four ranks). Criterion
  ``any`` halves μ when a single entry sits at ±max.

μ is kept in FP32 and updated in FP64, so 1000 steps double it to within a few units of the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.precision.gradients import Fp8Gradients, Start

_PAPER = Fp8Gradients(reduce="shared_scale")


def initial_mu(start: Start, world_size: int) -> float:
    """The first μ of ``world_size`` ranks by its name in the configuration."""
    if start == "one":
        return 1.0
    return 1.0 / world_size if start == "one_over_ranks" else 1.0 / math.sqrt(world_size)


class MuController:
    """One μ per gradient tensor, moved after each step; nothing waits for the device.

    Attributes:
        mu: FP32 [num tensors], always the same storage (updated in place).
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        world_size: int,
        device: torch.device,
        settings: Fp8Gradients = _PAPER,
    ) -> None:
        """Start every tensor at the same μ.

        Args:
            names: the tensors, in the order of ``mu``; keys of :meth:`state_tensors`.
            world_size: ranks that are summed, N.
            device: where the counts are.
            settings: where μ starts, what halves it and how many quiet steps double it.
        """
        initial = initial_mu(settings.mu_initial, world_size)
        self.mu = torch.full((len(names),), initial, dtype=torch.float32, device=device)
        self._names, self._low = tuple(names), 1.0 / (2 * world_size)
        self._threshold = settings.mu_threshold if settings.mu_criterion == "count" else 0.0
        self._growth = 2.0 ** (1.0 / settings.mu_window)

    @torch.no_grad()
    def update(
        self,
        saturated: Tensor,
        numel: Tensor,
        *,
        finite: Tensor | None = None,
        sharded_over: CountedGroup | None = None,
    ) -> None:
        """Move every μ once, after the step's reduction.

        Args:
            saturated: int64 [num tensors], codes at ±max of the reduced tensors.
            numel: int64 [num tensors], codes of the *whole* tensors, on the same device.
            finite: bool, [num tensors] or scalar; where false μ stays (a skipped step leaves no trace).
            sharded_over: the ranks, where ``saturated`` counts this rank's shard of a reduce-scatter only:
                the counts are summed over them first. None after an all-reduce, where all ranks count alike.
        """
        if sharded_over is not None:
            saturated = saturated.clone()
            sharded_over.all_reduce(saturated, purpose="saturation")()
        share = saturated.double() / numel.clamp(min=1)
        factor = torch.full_like(share, self._growth).masked_fill_(share > self._threshold, 0.5)
        moved = (self.mu.double() * factor).clamp(self._low, 1.0).float()
        self.mu.copy_(moved if finite is None else torch.where(finite, moved, self.mu))

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors for checkpoints: ``mu/`` + name, FP32 scalars that are views of :attr:`mu`. A value that
        was saved under another number of ranks is brought within the bounds by the next update."""
        return {f"mu/{name}": self.mu[i] for i, name in enumerate(self._names)}
