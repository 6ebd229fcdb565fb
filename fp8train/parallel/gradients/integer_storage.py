"""Gradients as integers on a grid that is known before the step, so that their sums are exact.

See :mod:`fp8train.parallel.gradients.grids`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.numerics.cast import amax_of, cast
from fp8train.numerics.exact_sum import power_of_two_fp64
from fp8train.numerics.scale import power_of_two
from fp8train.parallel.gradients.bucket import Storage
from fp8train.parallel.gradients.grids import GRID_BITS, GridScales, HeldSums, StepGrids, code_integers
from fp8train.parallel.gradients.receivers import Places
from fp8train.parallel.gradients.recorder import GradientRecorder
from fp8train.precision.number_formats import E4M3


class Fp8Points:
    """E4M3 codes as integers in INT32: the gradients of the FP8 plan."""

    dtype = torch.int32

    def __init__(self, recorder: GradientRecorder | None = None) -> None:
        """Args: ``recorder``: receives statistics of casts on sampled steps; a step has one cast per
        micro-batch, and the last one is what a recorder keeps."""
        self._recorder = recorder

    def integers(self, fqn: str, gradient: Tensor, grids: StepGrids, parameter: int) -> Tensor:
        """Cast a flat gradient to E4M3 with its parameter's scale: INT32 [elements], in units of 2^-9.
        Elements that leave the grid are clamped, and counted in ``grids``."""
        exponent = grids.exponents[parameter]
        scale = power_of_two(exponent)
        grids.count_outside(gradient.abs().float() * scale > E4M3.max)
        codes = cast(gradient, E4M3, scale, scale_is_power_of_two=True)
        if self._recorder is not None and self._recorder.active:
            finite = torch.isfinite(amax_of(gradient))  # a source that is not has no scale_inv
            scale_inv = torch.where(finite, power_of_two(-exponent), torch.nan)
            self._recorder.record(fqn, gradient, codes, scale_inv)
        return code_integers(codes)


class FixedPoints:
    """Fixed-point numbers of 2^40 steps in INT64: all other gradients."""

    dtype = torch.int64

    def integers(self, fqn: str, gradient: Tensor, grids: StepGrids, parameter: int) -> Tensor:
        """Round a flat gradient to a multiple of its parameter's step: INT64 [elements], at most 2^40 in
        magnitude. Elements that leave the grid are clamped, and counted in ``grids``; NaN becomes 0, and the
        step's amax tells of it."""
        limit = 2.0**GRID_BITS
        scaled = gradient.double() * power_of_two_fp64(grids.exponents[parameter])
        grids.count_outside(scaled.abs() > limit)
        return scaled.nan_to_num(nan=0.0).clamp(-limit, limit).round().to(torch.int64)


class IntegerStorage(Storage):
    """Adds a bucket's gradients up as integers."""

    def __init__(
        self, places: Places, points: Fp8Points | FixedPoints, *, scales: GridScales, device: torch.device
    ) -> None:
        """Allocate sums of zero. Args: ``places``: counted in elements; ``scales``: grids of all
        parameters."""
        self.places, self.points, self._scales = places, points, scales
        self._parameters = scales.positions([member.fqn for member in places.members])
        self._sums = torch.zeros(places.total, dtype=points.dtype, device=device)
        self._grids = scales.step

    @property
    def stored_bytes(self) -> int:
        """Bytes of the integer sums."""
        return self._sums.nbytes

    def begin(self) -> None:
        """Take the grids of the step that begins."""
        self._grids = self._scales.step

    def buffer(self, member: int) -> Tensor:
        """The member's sums as they are, integers: a view of the parameter's shape."""
        return self._sums[self.places.whole[member]].view(self.places.members[member].shape)

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Round a micro-batch's gradient to the grid and add it to the sums, which is exact."""
        grids, parameter = self._grids, self._parameters[member]
        assert grids is self._scales.step, "a step's grids are those that it began with"
        grids.record(parameter, gradient)
        fqn, sums = self.places.members[member].fqn, self._sums[self.places.whole[member]]
        integers = self.points.integers(fqn, gradient.reshape(-1), grids, parameter)
        if first:
            sums.copy_(integers)
        else:
            sums.add_(integers)

    def own_sum(self) -> Tensor:
        """Sum all integers; NaN if any gradient of the step so far was not finite."""
        return self._sums.sum(dtype=torch.float64) + 0.0 * self._grids.amax.max()

    def integers(self) -> Tensor:
        """This rank's sums of all members, flat [total]."""
        return self._sums

    def hold(self, sums: Tensor) -> HeldSums:
        """Hand over the sums over ranks of this rank's places, with the grids that they were made on."""
        return HeldSums(sums, self.places, self._grids, self._parameters)
