"""Exact reduction: the same bits for any number of ranks, any order and any split into micro-batches.

Floating-point sums depend on their order because every addition rounds. Integers do not. If the scale of a
parameter is known *before* the step, the FP8 code of each micro-batch's gradient is an integer on a common
grid (E4M3 values are multiples of 2^-9, at most 448 = 229376 · 2^-9), and sums of integers are exact. So:

* the scale of an FP8 parameter is ``2^floor(log2(448 / (8 · A)))`` with A the largest amax of the last 16
  steps that had one, a step's amax being the maximum over its micro-batches and ranks. The factor 8 leaves
  room for a gradient that grows;
* each micro-batch's gradient is cast once, to FP8 with that scale, and added in INT32;
* gradients outside the FP8 plan do the same on a fixed-point grid of 2^40 steps, in INT64;
* the optimizer reads the sum, which is never cast again;
* the norm is a sum of integers too (:mod:`fp8train.numerics.exact_sum`). Its grid follows from what all ranks
  know after the step: no sum exceeds the micro-batches of the global step times the grid point of the step's
  amax.

**A grid that does not fit.** A parameter without any amax has no grid, a gradient above 8·A would saturate,
and one far below A would drown in the spacing (all of it after a spike of 10^6 that entered the history). The
step's amax shows all three once the step's gradients are there, before anyone used them: such a parameter
gets a grid from this amax alone, and the step's batch is run again. Ordinary training pays for that in its
first step and at jumps. A gradient that is not finite changes no grid: its step is skipped.

**Who knows what when.** A :class:`StepGrids` is made when a step begins and goes with its integers to whoever
reads them; :class:`GridScales` makes the next one from the history, and never writes into one that exists.

A step's micro-batches must be the same whatever rank runs them (same size, same samples, same kernels and
threads), and so must the arithmetic of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.config.batch_sizes import MAX_EXACT_MICRO_BATCHES
from fp8train.numerics.cast import amax_of, cast, decode_finite
from fp8train.numerics.exact_sum import grid_square_sum, power_of_two_fp64, square_shift
from fp8train.numerics.scale import exponent_from_amax, power_of_two
from fp8train.parallel.gradients.receivers import Places
from fp8train.parallel.gradients.scales import GradientScales
from fp8train.precision.number_formats import E4M3

HISTORY = 16
MARGIN = 3
"""Powers of two between the largest amax seen and the end of the grid."""
GRID_BITS = 40  # of the fixed-point grid; 2^63 / 2^40 = 8 million micro-batches fit
CODE_UNIT = -9  # E4M3 values are multiples of 2^-9
_AMAX_SLACK = 1 + 2.0**-20  # an FP64 gradient may exceed its FP32 amax by half an ulp
_LARGEST_FALL = (2.0**-5, 2.0**-12)
"""How far below A a step's amax may be, by grid (FP8, fixed point). With the margin of 8 an FP8 amax is then
at 2^-8 of the format's maximum, and what is up to 2^6 smaller is still a normal number. A fixed-point amax
has 2^25 steps."""


def code_integers(codes: Tensor) -> Tensor:
    """Turn finite E4M3 values into integers, in units of 2^-9: INT32 of the same shape."""
    return decode_finite(codes, torch.float32).mul_(2.0**-CODE_UNIT).to(torch.int32)


class StepGrids:
    """The grids of one step, what its gradients showed on them, and what their integers are worth.

    Attributes:
        exponents: int32 [parameters]; a gradient g lies on the grid as ``g · 2^exponent``. Never changed.
        amax: FP32 [parameters], of the step's micro-batches so far; over all ranks after :meth:`agree`.
            Infinity where a gradient was not finite.
        outside: int64 scalar, elements that left the grid.
        square_shifts: int32 [parameters]; grids of the squared sums, after :meth:`agree`.
    """

    def __init__(self, exponents: Tensor, is_fp8: Tensor) -> None:
        self.exponents, self.is_fp8 = exponents, is_fp8
        self.amax = torch.zeros(exponents.shape, device=exponents.device)
        self.outside = torch.zeros((), dtype=torch.int64, device=exponents.device)
        self.square_shifts = torch.zeros_like(exponents)

    def record(self, parameter: int, gradient: Tensor) -> None:
        """Take a micro-batch's gradient into the step's amax. NaN counts as infinity, which a maximum
        keeps."""
        amax = amax_of(gradient).nan_to_num(nan=torch.inf, posinf=torch.inf)
        torch.maximum(self.amax[parameter], amax, out=self.amax[parameter])

    def count_outside(self, mask: Tensor) -> None:
        """Take a mask of the elements that left the grid."""
        self.outside += mask.sum()

    def agree(self, group: CountedGroup, numels: Tensor, contributions: int) -> None:
        """Agree on the step's amax and on the elements outside over all ranks, and compute what follows from
        them. ``contributions``: the most that were added up to any parameter."""
        wait_for_amax = group.all_reduce(self.amax, purpose="amax", op=dist.ReduceOp.MAX)
        wait_for_count = group.all_reduce(self.outside, purpose="saturated")
        wait_for_amax()
        self.square_shifts = square_shift(numels, self._largest_integers() * contributions)
        wait_for_count()

    def _largest_integers(self) -> Tensor:
        """FP64 [parameters]: no micro-batch's grid point of the step exceeds it. Casts are monotone, so for
        FP8 it is the code of the amax."""
        codes = code_integers(cast(self.amax, E4M3, power_of_two(self.exponents))).double()
        fixed = self.amax.double() * power_of_two_fp64(self.exponents) * _AMAX_SLACK + 1
        return torch.where(self.is_fp8, codes, fixed.clamp(max=2.0**GRID_BITS))

    @property
    def finite(self) -> Tensor:
        """Bool [parameters]: finite in every micro-batch; after :meth:`agree`."""
        return torch.isfinite(self.amax)

    def unit(self, parameter: int) -> Tensor:
        """What one integer of this parameter is worth: FP64 scalar, a power of two."""
        zero = torch.zeros_like(self.exponents[parameter])
        exponent = torch.where(self.is_fp8[parameter], zero + CODE_UNIT, zero) - self.exponents[parameter]
        return power_of_two_fp64(exponent)

    def square_unit(self, parameter: int) -> Tensor:
        """FP64 scalar, a power of two, the same on all ranks: what a step of a square sum is worth."""
        return self.unit(parameter).square() * power_of_two_fp64(self.square_shifts[parameter])


@dataclass(frozen=True)
class HeldSums:
    """Sums on a grid as the optimizer reads them; see :class:`~fp8train.parallel.gradients.held.Held`.

    Attributes:
        sums: int32 or int64, flat.
        places: in elements.
        grids: those that the sums were made on.
        parameters: of each member, its number in ``grids``.
    """

    sums: Tensor
    places: Places
    grids: StepGrids
    parameters: Sequence[int]

    def _integers(self, member: int) -> Tensor:
        return self.sums[self.places.held[member]]

    def chunk(self, member: int, start: int, stop: int) -> Tensor:
        """Return elements ``start .. stop`` of a member's rows on this rank: integers times their unit,
        FP32."""
        unit = self.grids.unit(self.parameters[member])
        return (self._integers(member)[start:stop].double() * unit).float()

    def stored(self, member: int, start: int, stop: int) -> None:
        """Nothing: integers are decoded here alone."""

    def norms(self, dtype: torch.dtype) -> Tensor:
        """Euclidean norm of each member's elements on this rank, FP64 [members]; after
        :meth:`StepGrids.agree`."""
        squares = [self.square(member) for member in range(len(self.parameters))]
        return torch.stack([total.double() * unit for total, unit in squares]).sqrt()

    def square(self, member: int) -> tuple[Tensor, Tensor]:
        """(int64 sum of squares of the elements of a member that are here, FP64 value of one of them), after
        :meth:`StepGrids.agree`. Ranks that hold the other elements add theirs, which is exact and does not
        depend on who holds what. The unit is NaN where the gradient was not finite."""
        parameter = self.parameters[member]
        total = grid_square_sum(self._integers(member), self.grids.square_shifts[parameter])
        unit = self.grids.square_unit(parameter)
        return total, torch.where(self.grids.finite[parameter], unit, torch.nan)


class GridScales(GradientScales):
    """Makes the grids of each step: amax of the last 16 steps, and the exponents that follow. See the module.

    Attributes:
        step: grids of the running (or last) step.
        saturated: int64 scalar, elements that left the grid on any rank in applied steps since the start of
            the run. Zero unless arithmetic is not reproducible, as such steps are repeated.
        repeated: steps that were run again, since the start of the process.
    """

    name = "exact"

    def __init__(
        self,
        is_fp8: Sequence[bool],
        numels: Sequence[int],
        *,
        position: Mapping[str, int],
        micro_batches: int,
        parts: int = 1,
        group: CountedGroup,
        device: torch.device,
    ) -> None:
        """Allocate an empty history: no parameter has a grid before its first step.

        Args:
            is_fp8: which grid each parameter has.
            numels: elements of each whole parameter, whatever part of it a rank holds.
            position: of each parameter among these, by FQN.
            micro_batches: contributions to a parameter in the global step, 1 to
                :data:`MAX_EXACT_MICRO_BATCHES`.
            parts: tensor-parallel ranks; as many times more contribute to parameters that they hold whole.
            group: ranks that must agree.
            device: where gradients live.
        """
        assert 1 <= micro_batches <= MAX_EXACT_MICRO_BATCHES, f"{micro_batches} micro-batches overflow INT32"
        self._position, self._group, self._contributions = position, group, micro_batches * parts
        self._is_fp8 = torch.tensor(list(is_fp8), device=device)
        self._numels = torch.tensor(list(numels), device=device)
        self._history = torch.zeros(HISTORY, len(numels), device=device)
        self.saturated = torch.zeros((), dtype=torch.int64, device=device)
        self.repeated = 0
        self._may_repeat = True
        self.step = self._next()

    def positions(self, fqns: Sequence[str]) -> list[int]:
        """Number of each of these parameters among the grids."""
        return [self._position[fqn] for fqn in fqns]

    def begin_step(self) -> None:
        """Make the grids of a step from the history; they hold for all of its micro-batches."""
        self.step = self._next()

    def end_step(self) -> None:
        """Agree with the other ranks on the step's amaxes and on the elements that left the grid."""
        self.step.agree(self._group, self._numels, self._contributions)

    def must_repeat(self) -> bool:
        """Give parameters whose grid did not fit one that does, and return whether there are any; waits for
        the device. A step is repeated once."""
        again = self._may_repeat and bool(self._refit())
        self._may_repeat = not again
        self.repeated += again
        return again

    def _refit(self) -> Tensor:
        """Bool scalar: the history of some parameters is now this step's amax."""
        amax, largest = self.step.amax, self._history.amax(dim=0)
        fall = torch.where(self._is_fp8, *_LARGEST_FALL)
        end = torch.where(self._is_fp8, E4M3.max, 2.0**GRID_BITS)
        outgrown = amax.double() * power_of_two_fp64(self.step.exponents) > end
        misfit = (amax > 0) & ((largest == 0) | outgrown | (amax < largest * fall))
        misfit &= torch.isfinite(amax).all()  # a step that is not finite will be skipped
        fresh = torch.zeros_like(self._history)
        fresh[0] = amax
        self._history.copy_(torch.where(misfit, fresh, self._history))
        return misfit.any()

    def commit(self) -> None:
        """Take the step's amax into the history, as the step was applied. One that is zero tells nothing
        about a grid."""
        amax = self.step.amax
        shifted = torch.cat((amax[None], self._history[:-1]))
        self._history.copy_(torch.where((amax > 0) & torch.isfinite(amax), shifted, self._history))
        self.saturated += self.step.outside

    def _next(self) -> StepGrids:
        largest = self._history.amax(dim=0)
        fp8 = exponent_from_amax(largest, max_exponent=E4M3.max_exponent, margin=MARGIN)
        # amax < 2^(e+1): one more power of two than its exponent stays on the fixed-point grid.
        fixed = GRID_BITS - 1 - MARGIN - (largest.view(torch.int32) >> 23) + 127
        exponents = torch.where(self._is_fp8, fp8, fixed.clamp(-126, 126)).to(torch.int32)
        return StepGrids(exponents, self._is_fp8)

    def state_tensors(self) -> Mapping[str, Tensor]:
        """The history and the count of saturated elements, for checkpoints; they are filled in place."""
        return {"exact/amax_history": self._history, "exact/saturated": self.saturated}

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """Elements that left their grid in applied steps, and steps that were run again to avoid that, as
        ``fp8/...``."""
        return {
            "fp8/gradient_saturated_elements": float(self.saturated),
            "fp8/gradient_repeated_steps": float(self.repeated),
        }
