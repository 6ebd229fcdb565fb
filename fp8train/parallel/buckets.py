"""Buckets: storage of gradients that are reduced together, and how.

A bucket owns consecutive parameters of one kind. The gradient store decides *when* (it counts contributions
and launches buckets in one order on all ranks); a bucket decides *how*:

* :class:`PlainBucket`: high precision, one flat buffer, an all-reduce in FP32 or BF16;
* :mod:`fp8train.parallel.fp8_buckets`: FP8 codes with block scales;
* :mod:`fp8train.parallel.shared_scale_bucket`: FP8 codes with one scale per tensor, as FP8-LM has them;
* :mod:`fp8train.parallel.exact`: integer sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup


@dataclass(frozen=True)
class Member:
    """A parameter in a bucket: fully qualified name and local shape."""

    fqn: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()


class GradientReader(Protocol):
    """A reduced gradient as the optimizer reads it, a piece at a time: FP8 is never widened as a whole."""

    def chunk(self, start: int, stop: int) -> Tensor:
        """Elements ``start .. stop`` of the local tensor in row-major order; not to be written to.

        Returns:
            FP32, or FP64 in FP64 runs, [stop - start].
        """
        ...


class Bucket(Protocol):
    """What the gradient store asks of a bucket. ``member`` is a position in ``members``."""

    members: Sequence[Member]

    @property
    def stored_bytes(self) -> int:
        """What it keeps between steps, scales included."""
        ...

    @property
    def accumulator_bytes(self) -> int:
        """What it needs beside that while micro-batches add up."""
        ...

    def buffer(self, member: int) -> Tensor:
        """What a contribution mutates, of the parameter's shape: declared to the compiler, never read."""
        ...

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Take one micro-batch's gradient; ``first`` of the step overwrites."""
        ...

    def launch(self) -> None:
        """Every contribution of this rank is in: start the reduction."""
        ...

    def advance(self) -> None:
        """Do what the first communication enables and start the next; called once, after ``launch``."""
        ...

    def finish(self) -> None:
        """Wait for the result."""
        ...

    def reader(self, member: int) -> GradientReader:
        """The gradient in pieces, after ``finish``."""
        ...

    def grad(self, member: int) -> Tensor:
        """The whole gradient: local sum before ``launch``, global after ``finish``."""
        ...

    def norm(self, member: int, dtype: torch.dtype) -> Tensor:
        """Euclidean norm of a member, scalar in ``dtype``; NaN if the gradient is not finite."""
        ...


@dataclass(frozen=True)
class TensorReader:
    """A gradient held as a flat tensor."""

    flat: Tensor

    def chunk(self, start: int, stop: int) -> Tensor:
        """See :class:`GradientReader`."""
        values = self.flat[start:stop]
        return values if values.dtype in (torch.float32, torch.float64) else values.float()


class PlainBucket:
    """Gradients in the accumulation dtype, reduced by an all-reduce in ``reduce``."""

    accumulator_bytes = 0

    def __init__(
        self,
        members: Sequence[Member],
        *,
        accumulate: torch.dtype,
        reduce: torch.dtype,
        group: CountedGroup,
        device: torch.device,
    ) -> None:
        self.members = members
        self._reduce, self._group = reduce, group
        self._flat = torch.zeros(sum(m.numel for m in members), dtype=accumulate, device=device)
        self._views: list[Tensor] = []
        offset = 0
        for member in members:
            self._views.append(self._flat[offset : offset + member.numel].view(member.shape))
            offset += member.numel
        self._wire: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    @property
    def stored_bytes(self) -> int:
        """See :class:`Bucket`."""
        return self._flat.nbytes

    def buffer(self, member: int) -> Tensor:
        """See :class:`Bucket`."""
        return self._views[member]

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """See :class:`Bucket`."""
        view = self._views[member]
        if first:
            view.copy_(gradient)
        else:
            view.add_(gradient)

    def launch(self) -> None:
        """See :class:`Bucket`."""
        self._wire = self._flat if self._flat.dtype == self._reduce else self._flat.to(self._reduce)
        self._wait = self._group.all_reduce(self._wire, purpose="gradient")

    def advance(self) -> None:
        """Nothing: one collective does it all."""

    def finish(self) -> None:
        """See :class:`Bucket`."""
        assert self._wait is not None
        assert self._wire is not None
        self._wait()
        if self._wire is not self._flat:
            self._flat.copy_(self._wire)
        self._wire = self._wait = None

    def reader(self, member: int) -> GradientReader:
        """See :class:`Bucket`."""
        return TensorReader(self._views[member].view(-1))

    def grad(self, member: int) -> Tensor:
        """See :class:`Bucket`; a view, in the accumulation dtype."""
        return self._views[member]

    def norm(self, member: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Bucket`."""
        return torch.linalg.vector_norm(self._views[member], dtype=dtype)


class GradientRecorder(Protocol):
    """Takes statistics of gradient casts; see :class:`fp8train.numerics.statistics.CastRecorder`."""

    @property
    def active(self) -> bool:
        """Whether this step is sampled."""
        ...

    def record(self, fqn: str, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        """Take one cast: source and payload of one shape, ``scale_inv`` broadcastable to it."""
        ...
