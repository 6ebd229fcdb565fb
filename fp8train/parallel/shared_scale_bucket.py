"""Gradients in FP8 with one scale per tensor, reduced as FP8-LM does: a shared scale, a sum in FP8,
auto-scaling.

The reduction itself is in :mod:`fp8train.comm.shared_scale`. This bucket holds what goes in and what comes
out: micro-batches add up in BF16 or FP32, or, for fidelity to MS-AMP, in FP8 with a new scale at every
addition (which loses small contributions when there are many micro-batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.fp8_all_reduce import Algorithm
from fp8train.comm.shared_scale import ReducedBucket, SharedScaleReduction
from fp8train.numerics.cast import quantize, uncast
from fp8train.numerics.formats import Format
from fp8train.numerics.quant_spec import QuantSpec
from fp8train.parallel.buckets import GradientReader, GradientRecorder, Member


@dataclass
class _Accumulator:
    """One tensor's sum over micro-batches; ``scale_inv`` is None in high precision."""

    payload: Tensor
    scale_inv: Tensor | None

    def add(self, gradient: Tensor, spec: QuantSpec, *, first: bool) -> None:
        if self.scale_inv is None:
            self.payload.copy_(gradient) if first else self.payload.add_(gradient)
            return
        total = gradient if first else gradient.float() + uncast(self.payload, self.scale_inv)
        payload, scale_inv = quantize(total, spec)
        self.payload.view(torch.uint8).copy_(payload.view(torch.uint8))
        self.scale_inv.copy_(scale_inv)

    def values(self) -> Tensor:
        return self.payload if self.scale_inv is None else uncast(self.payload, self.scale_inv)


@dataclass(frozen=True)
class SharedState:
    """What all buckets share, and this one's places in it.

    Attributes:
        mu: FP32, auto-scaling factors of all tensors; read when the bucket is cast.
        saturated: int64 of the same shape; receives the codes at ±max of the reduced tensors.
        positions: int64 [members].
    """

    mu: Tensor
    saturated: Tensor
    positions: Tensor


class SharedScaleBucket:
    """Per-tensor scales and an FP8 sum; see the module."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        fmt: Format,
        accumulate: torch.dtype,
        state: SharedState,
        group: CountedGroup,
        algorithm: Algorithm,
        purpose: str,
        recorder: GradientRecorder | None = None,
        device: torch.device,
    ) -> None:
        """Allocate.

        Args:
            members: parameters.
            fmt: of the codes.
            accumulate: BF16, FP32, or ``fmt.dtype`` to add in FP8.
            state: auto-scaling factors and counts.
            group: data-parallel ranks.
            algorithm: who adds.
            purpose: name in the byte counters.
            recorder: receives statistics of the cast of each member that goes onto the wire, on sampled
                steps.
            device: where it lives.
        """
        self.members = members
        self._format, self._spec, self._group = fmt, QuantSpec(fmt), group
        self._state, self._algorithm, self._purpose = state, algorithm, purpose
        self._recorder = recorder
        in_fp8 = accumulate == fmt.dtype
        self._accumulators = [
            _Accumulator(
                torch.zeros(m.shape, dtype=torch.uint8, device=device).view(fmt.dtype)
                if in_fp8
                else torch.zeros(m.shape, dtype=accumulate, device=device),
                torch.ones((), device=device) if in_fp8 else None,
            )
            for m in members
        ]
        self._reduction: SharedScaleReduction | None = None
        self._result: ReducedBucket | None = None

    @property
    def stored_bytes(self) -> int:
        """See :class:`~fp8train.parallel.buckets.Bucket`: the reduced codes and a scale per tensor."""
        return sum(member.numel + 4 for member in self.members)

    @property
    def accumulator_bytes(self) -> int:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        return sum(accumulator.payload.nbytes for accumulator in self._accumulators)

    def buffer(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        payload = self._accumulators[member].payload
        return payload.view(torch.uint8) if payload.element_size() == 1 else payload

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        self._result = None
        self._accumulators[member].add(gradient, self._spec, first=first)

    def launch(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`: agree on the scales."""
        self._reduction = SharedScaleReduction(
            [accumulator.values() for accumulator in self._accumulators],
            self._state.mu[self._state.positions],
            self._group,
            fmt=self._format,
            algorithm=self._algorithm,
            purpose=self._purpose,
            on_cast=self._record if self._recorder is not None and self._recorder.active else None,
        )
        self._reduction.start()

    def _record(self, member: int, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        assert self._recorder is not None
        self._recorder.record(self.members[member].fqn, source, payload, scale_inv)

    def advance(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`: cast and send."""
        assert self._reduction is not None
        self._reduction.send()

    def finish(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        assert self._reduction is not None
        self._result = self._reduction.finish()
        self._state.saturated[self._state.positions] = self._result.saturated
        self._reduction = None

    def reader(self, member: int) -> GradientReader:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        assert self._result is not None
        return _Reader(self._result.payload(member), self._result.scale_inv[member])

    def grad(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; FP32."""
        if self._result is None:
            return self._accumulators[member].values().float()
        return self._result.values(member).view(self.members[member].shape)

    def norm(self, member: int, dtype: torch.dtype) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        return torch.linalg.vector_norm(self.grad(member), dtype=dtype)


@dataclass(frozen=True)
class _Reader:
    payload: Tensor
    scale_inv: Tensor

    def chunk(self, start: int, stop: int) -> Tensor:
        return uncast(self.payload[start:stop], self.scale_inv)
