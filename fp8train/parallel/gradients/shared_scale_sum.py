"""The sum of FP8-LM: ranks agree on a scale per tensor, cast, and add in FP8.

See :mod:`fp8train.comm.shared_scale`. Owners receive their rows by a reduce-scatter, half of the bytes. Which
rank adds last depends on where an element lies in the message, so the last bits of an FP8 sum of more than
two ranks depend on who receives it.
"""

from __future__ import annotations

from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.shared_scale import SharedScaleReduction
from fp8train.parallel.gradients.auto_scales import AutoScales, StepFactors
from fp8train.parallel.gradients.held import HeldTensors
from fp8train.parallel.gradients.recorder import GradientRecorder
from fp8train.parallel.gradients.tensor_storage import TensorStorage
from fp8train.precision.gradients import Algorithm


class SharedScaleSum:
    """Reduces a bucket as FP8-LM does: one scale per tensor for all ranks, sums in FP8 (a
    :class:`~fp8train.parallel.gradients.bucket.Reduction`)."""

    def __init__(
        self,
        storage: TensorStorage,
        group: CountedGroup,
        *,
        scales: AutoScales,
        agree: CountedGroup,
        algorithm: Algorithm,
        purpose: str,
        counts: bool = True,
        recorder: GradientRecorder | None = None,
    ) -> None:
        """Args:
        storage: sums of this rank.
        group: data-parallel ranks.
        scales: auto-scaling factors.
        agree: ranks that hold gradients of the same tensors, or parts of them.
        algorithm: who adds.
        purpose: name in the byte counters.
        counts: whether this rank counts codes at ±max; of sums that several ranks hold alike, one does.
        recorder: receives statistics of the cast of each member that goes onto the wire, on sampled steps.
        """
        self._storage, self._group, self._scales, self._agree = storage, group, scales, agree
        self._algorithm, self._purpose, self._recorder = algorithm, purpose, recorder
        self._counts = counts
        self._positions = scales.positions([member.fqn for member in storage.places.members])
        self._step: StepFactors | None = None
        self._reduction: SharedScaleReduction | None = None

    def start(self) -> None:
        """Start to agree on a scale per tensor: a MAX all-reduce of the amaxes."""
        places = self._storage.places
        self._step = self._scales.step
        self._reduction = SharedScaleReduction(
            self._storage.tensors(),
            self._step.mu[self._positions],
            self._group,
            fmt=self._storage.format,
            algorithm=self._algorithm,
            scatter=places.scattered,
            purpose=self._purpose,
            on_cast=self._record if self._recorder is not None and self._recorder.active else None,
            agree=self._agree,
            order=places if places.scattered else None,
        )
        self._reduction.start()

    def _record(self, member: int, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        assert self._recorder is not None
        fqn = self._storage.places.members[member].fqn
        self._recorder.record(fqn, source, payload, scale_inv)

    def advance(self) -> None:
        """Cast this rank's sums with the scales agreed on, and start their sum in FP8."""
        assert self._reduction is not None
        self._reduction.send()

    def finish(self) -> HeldTensors:
        """Wait for the FP8 sums, count those at ±max, and return them with the scales that they were cast
        with."""
        assert self._reduction is not None and self._step is not None
        result = self._reduction.finish()
        if self._counts:
            self._step.saturated[self._positions] = result.saturated
        self._reduction = self._step = None
        payloads = [result.payload(member) for member in range(len(self._positions))]
        return HeldTensors(payloads, result.scale_inv)
