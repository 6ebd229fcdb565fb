"""Exact reduction: the same bits for any number of ranks, any order and any split into micro-batches.

Floating-point sums depend on their order because every addition rounds. Integers do not. If the scale of a
parameter is known *before* the step, the FP8 code of each micro-batch's gradient is an integer on a common
grid (E4M3 values are multiples of 2^-9, at most 448 = 229376 · 2^-9), and sums of integers are exact. So:

* the scale of an FP8 parameter is ``2^floor(log2(448 / (8 · A)))`` with A the largest amax of the last 16
  steps, a step's amax being the maximum over its micro-batches and ranks. The factor 8 leaves room for a
  gradient that grows; what exceeds it saturates and is counted;
* each micro-batch's gradient is cast once, to FP8 with that scale, and added in INT32. With one micro-batch
  a rank the codes themselves travel;
* gradients outside the FP8 plan do the same on a fixed-point grid of 2^40 steps, in INT64;
* the optimizer reads the sum, which is never cast again;
* the norm is a sum of integers too (:mod:`fp8train.numerics.exact_sum`): ranks that hold parts of a parameter
  add their :meth:`ExactBucket.square_sum`. Its grid follows from what all ranks know after the step: no sum
  exceeds the micro-batches of the global step times the grid point of the step's amax.

A step's micro-batches must be the same whatever rank runs them (same size, same samples, same kernels and
threads), and so must the arithmetic of each. The first step has no history: its batch is run once before,
for the amax alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import padded_blocks
from fp8train.numerics.cast import amax_of, cast, decode_finite
from fp8train.numerics.exact_sum import grid_square_sum, power_of_two_fp64, square_shift
from fp8train.numerics.formats import E4M3
from fp8train.numerics.scale import exponent_from_amax, power_of_two
from fp8train.parallel.buckets import GradientReader, GradientRecorder, Member

HISTORY = 16
MARGIN = 3
"""Powers of two between the largest amax seen and the end of the grid."""
MAX_MICRO_BATCHES = (2**31 - 1) // (448 * 2**9)
"""Of a global step: as many E4M3 codes add up in INT32, whatever they are."""
_CODE_UNIT = -9  # E4M3 values are multiples of 2^-9
_GRID_BITS = 40  # of the fixed-point grid; 2^63 / 2^40 = 8 million micro-batches fit
_AMAX_SLACK = 1 + 2.0**-20  # an FP64 gradient may exceed its FP32 amax by half an ulp


class GridScales:
    """The grids of all parameters: amax of the running step, of the last 16, and the exponents that follow.

    Attributes:
        exponents: int32 [parameters]; a gradient g lies on the grid as ``g · 2^exponent``.
        square_shifts: int32 [parameters]; grids of the squared sums, see
            :mod:`fp8train.numerics.exact_sum`; of the running step after :meth:`agree`.
        saturated: int64 scalar, elements that left the grid on any rank, in applied steps since the start of
            the run.
        calibrating: True while a batch is run for its amax only.
    """

    def __init__(
        self,
        is_fp8: Sequence[bool],
        numels: Sequence[int],
        *,
        micro_batches: int,
        group: CountedGroup,
        device: torch.device,
    ) -> None:
        """Allocate.

        Args:
            is_fp8: which grid each parameter has.
            numels: elements of each whole parameter, whatever part of it a rank holds.
            micro_batches: of the global step, 1 to :data:`MAX_MICRO_BATCHES`.
            group: ranks that must agree.
            device: where gradients live.
        """
        assert 1 <= micro_batches <= MAX_MICRO_BATCHES, f"{micro_batches} micro-batches overflow INT32"
        count = len(is_fp8)
        self._group, self._micro_batches = group, micro_batches
        self._is_fp8 = torch.tensor(list(is_fp8), device=device)
        self._numels = torch.tensor(list(numels), device=device)
        self._history = torch.zeros(HISTORY, count, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._amax = torch.zeros(count, device=device)
        self.exponents = torch.zeros(count, dtype=torch.int32, device=device)
        self.square_shifts = torch.zeros(count, dtype=torch.int32, device=device)
        self.saturated = torch.zeros((), dtype=torch.int64, device=device)
        self._step_saturated = torch.zeros((), dtype=torch.int64, device=device)
        self.calibrated = False
        self.calibrating = False

    def begin_step(self) -> None:
        """Forget what an unfinished step recorded."""
        self._amax.zero_()
        self._step_saturated.zero_()

    def record(self, parameter: int, gradient: Tensor) -> None:
        """Take a micro-batch's gradient into the step's amax. NaN counts as infinity, which a maximum
        keeps."""
        amax = amax_of(gradient).nan_to_num(nan=torch.inf, posinf=torch.inf)
        torch.maximum(self._amax[parameter], amax, out=self._amax[parameter])

    def count_saturated(self, outside: Tensor) -> None:
        """Take a mask of the elements that left the grid."""
        self._step_saturated += outside.sum()

    def agree(self) -> None:
        """The step's amax and saturated elements over all ranks, and what follows from them."""
        wait_for_amax = self._group.all_reduce(self._amax, purpose="amax", op=dist.ReduceOp.MAX)
        wait_for_count = self._group.all_reduce(self._step_saturated, purpose="saturated")
        wait_for_amax()
        largest = self._largest_integers() * self._micro_batches
        self.square_shifts = square_shift(self._numels, largest)
        wait_for_count()

    def _largest_integers(self) -> Tensor:
        """FP64 [parameters]: no micro-batch's grid point of the running step exceeds it. Casts are monotone,
        so for FP8 it is the code of the amax."""
        codes = _code_integers(cast(self._amax, E4M3, power_of_two(self.exponents))).double()
        fixed = self._amax.double() * power_of_two_fp64(self.exponents) * _AMAX_SLACK + 1
        return torch.where(self._is_fp8, codes, fixed.clamp(max=2.0**_GRID_BITS))

    def finite(self, parameter: int) -> Tensor:
        """Whether the parameter's gradient was finite in every micro-batch, bool scalar; after
        :meth:`agree`."""
        return torch.isfinite(self._amax[parameter])

    def commit(self) -> None:
        """The step was applied: its amax enters the history, and the grids of the next step follow."""
        amax = torch.where(torch.isfinite(self._amax), self._amax, 0.0)
        self._history[1:] = self._history[:-1].clone()
        self._history[0] = amax
        self.calibrated = True
        self.saturated += self._step_saturated
        self._derive()

    def _derive(self) -> None:
        largest = self._history.amax(dim=0)
        fp8 = exponent_from_amax(largest, max_exponent=E4M3.max_exponent, margin=MARGIN)
        # amax < 2^(e+1): one more power of two than its exponent stays on the fixed-point grid.
        fixed = _GRID_BITS - 1 - MARGIN - (largest.view(torch.int32) >> 23) + 127
        self.exponents = torch.where(self._is_fp8, fp8, fixed.clamp(-126, 126)).to(torch.int32)

    def state_tensors(self) -> dict[str, Tensor]:
        """The history and the count of saturated elements, for checkpoints; equal on all ranks."""
        return {"exact/amax_history": self._history, "exact/saturated": self.saturated}

    def restored(self) -> None:
        """:meth:`state_tensors` were filled from a checkpoint."""
        self.calibrated = bool(self._history.any())
        self._derive()


class ExactBucket:
    """Integer sums of gradients; see the module. Subclasses say how a gradient becomes integers."""

    integer: torch.dtype
    accumulator_bytes = 0

    def __init__(
        self,
        members: Sequence[Member],
        *,
        scales: GridScales,
        parameters: Sequence[int],
        group: CountedGroup,
        contributions: int,
        recorder: GradientRecorder | None = None,
        device: torch.device,
    ) -> None:
        """Allocate.

        Args:
            members: parameters.
            scales: grids of all parameters.
            parameters: index in ``scales`` of each member.
            group: data-parallel ranks.
            contributions: micro-batches of a step on this rank.
            recorder: receives statistics of casts to FP8 on sampled steps; a step has one cast per
                micro-batch, and the last one is what a recorder keeps.
            device: where it lives.
        """
        self.members = members
        self._scales, self._parameters, self._group = scales, list(parameters), group
        self._recorder = recorder
        self._single = contributions == 1
        self._offsets = [0]
        for member in members:
            self._offsets.append(self._offsets[-1] + member.numel)
        size = padded_blocks(self._offsets[-1], group.size)
        self._sums = torch.zeros(size, dtype=self.integer, device=device)
        self._wait: Callable[[], None] | None = None

    @property
    def stored_bytes(self) -> int:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        return self._sums.nbytes

    def _flat(self, member: int) -> Tensor:
        return self._sums[self._offsets[member] : self._offsets[member + 1]]

    def buffer(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        return self._flat(member).view(self.members[member].shape)

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        self._scales.record(self._parameters[member], gradient)
        if self._scales.calibrating:
            return
        integers = self._to_integers(member, gradient.reshape(-1))
        if first:
            self._flat(member).copy_(integers)
        else:
            self._flat(member).add_(integers)

    def _exponent(self, member: int) -> Tensor:
        return self._scales.exponents[self._parameters[member]]

    @abstractmethod
    def _to_integers(self, member: int, gradient: Tensor) -> Tensor:
        """Grid points of a member's flat gradient, in ``integer``."""

    @abstractmethod
    def _unit(self, member: int) -> Tensor:
        """FP64 scalar: the value of one step of the grid."""

    def launch(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        if not self._scales.calibrating:
            self._wait = self._group.all_reduce(self._sums, purpose=self._purpose)

    @property
    def _purpose(self) -> str:
        return "gradient_exact"

    def advance(self) -> None:
        """Nothing: one collective does it all."""

    def finish(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        if self._wait is not None:
            self._wait()
            self._wait = None

    def reader(self, member: int) -> GradientReader:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        return _IntegerReader(self._flat(member), self._unit(member))

    def grad(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; FP32."""
        member_shape = self.members[member].shape
        return self.reader(member).chunk(0, self.members[member].numel).view(member_shape)

    def norm(self, member: int, dtype: torch.dtype) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; after :meth:`GridScales.agree`."""
        norm = torch.sqrt(self.square_sum(member).double() * self.square_unit(member))
        return torch.where(self._scales.finite(self._parameters[member]), norm, torch.nan).to(dtype)

    def square_sum(self, member: int) -> Tensor:
        """The sum of squares of the elements of a member that this rank holds, in units of
        :meth:`square_unit`: int64 scalar, after :meth:`GridScales.agree`. Ranks that hold the other elements
        add theirs, which is exact and does not depend on who holds what."""
        return grid_square_sum(self._flat(member), self._scales.square_shifts[self._parameters[member]])

    def square_unit(self, member: int) -> Tensor:
        """FP64 scalar, a power of two, the same on all ranks: what a step of :meth:`square_sum` is worth."""
        shift = self._scales.square_shifts[self._parameters[member]]
        return self._unit(member).square() * power_of_two_fp64(shift)


@dataclass(frozen=True)
class _IntegerReader:
    flat: Tensor
    unit: Tensor

    def chunk(self, start: int, stop: int) -> Tensor:
        return (self.flat[start:stop].double() * self.unit).float()


class ExactFp8Bucket(ExactBucket):
    """Gradients of the FP8 plan: sums of E4M3 codes in INT32.

    With one micro-batch a rank, codes travel: an all-to-all of bytes, the sum of each rank's part, an
    all-gather of INT32 (5 bytes an element instead of 8).
    """

    integer = torch.int32

    def _to_integers(self, member: int, gradient: Tensor) -> Tensor:
        scale = power_of_two(self._exponent(member))
        self._scales.count_saturated(gradient.abs().float() * scale > E4M3.max)
        codes = cast(gradient, E4M3, scale, scale_is_power_of_two=True)
        if self._recorder is not None and self._recorder.active:
            finite = torch.isfinite(amax_of(gradient))  # a source that is not has no scale_inv
            scale_inv = torch.where(finite, power_of_two(-self._exponent(member)), torch.nan)
            self._recorder.record(self.members[member].fqn, gradient, codes, scale_inv)
        return _code_integers(codes)

    def _unit(self, member: int) -> Tensor:
        return power_of_two_fp64(_CODE_UNIT - self._exponent(member))

    def launch(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        if not self._single or self._group.size == 1 or self._scales.calibrating:
            super().launch()
            return
        ranks = self._group.size
        # Integers that are one code each are that code again: exact both ways.
        codes = (self._sums.float() * 2.0**_CODE_UNIT).to(E4M3.dtype).view(torch.uint8).view(ranks, -1)
        received = torch.empty_like(codes)
        wait = self._group.all_to_all(received, codes, purpose=self._purpose)
        self._wait = lambda: self._gather(received, wait)

    def _gather(self, received: Tensor, wait: Callable[[], None]) -> None:
        wait()
        part = _code_integers(received.view(E4M3.dtype)).sum(dim=0, dtype=torch.int32)
        self._group.all_gather(self._sums.view(self._group.size, -1), part, purpose=self._purpose)()


def _code_integers(codes: Tensor) -> Tensor:
    """E4M3 values in units of 2^-9, INT32."""
    return decode_finite(codes, torch.float32).mul_(2.0**-_CODE_UNIT).to(torch.int32)


class ExactFixedPointBucket(ExactBucket):
    """All other gradients: a grid of 2^40 steps, sums in INT64."""

    integer = torch.int64

    def _to_integers(self, member: int, gradient: Tensor) -> Tensor:
        limit = 2.0**_GRID_BITS
        scaled = gradient.double() * power_of_two_fp64(self._exponent(member))
        self._scales.count_saturated(scaled.abs() > limit)
        return scaled.nan_to_num(nan=0.0).clamp(-limit, limit).round().to(torch.int64)

    def _unit(self, member: int) -> Tensor:
        return power_of_two_fp64(-self._exponent(member))
