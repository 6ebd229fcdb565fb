"""The shared-scale FP8 all-reduce of FP8-LM (Peng et al. 2023, section 2.1, Eqs. 3 to 6).

The ranks hold gradients g_i of one tensor. FP8 payloads can only be added as they are if all ranks use one
scale. So the ranks agree on the smallest, ``s_g = min_i s_i`` (Eq. 4); each casts with it,
``q_i = FP8(s_g · μ · g_i)`` (Eqs. 3 and 5); the payloads are added in FP8 (:mod:`fp8train.comm.fp8_sum`); and

    sum of the g_i  = (sum of the q_i) / s,      s = s_g · μ
    mean of the g_i = (sum of the q_i) / (N · s)                       (Eq. 6)

Averaging only touches the scalar and is exact wherever the sum is.

* ``s_i`` is a power of two and falls with amax, so the smallest scale is the scale of the largest amax: one
  MAX all-reduce of FP32 scalars serves all tensors of a bucket. A rank whose tensor is all zero has amax 0
  and no say, which a minimum over scales would give it.
* One cast instead of the paper's two (FP8 with the local scale, then with the shared one): with power-of-two
  scales the results are equal, except among subnormals, where one rounding is better than two.
* μ multiplies the *scale* after the power of two is found, so it makes payloads smaller whether the scale is
  above or below 1 (multiplying amax or a reciprocal turns it round for amax > 448).
* MAX drops NaN on some backends: a NaN amax travels as infinity. A tensor that is not finite on any rank has
  ``scale_inv`` NaN on all of them; the scale it was cast with is finite and forgotten with the step.
* Entries at ±max are counted in the reduced payload, where sums overflow. A partial sum that overflows and
  is then pulled back by terms of the other sign is not seen, here or in NCCL.

:class:`SharedScaleReduction` has three moments so that it can run beside backward; the two functions run it
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm import fp8_all_reduce
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.fp8_sum import chunk_length, count_at_maximum
from fp8train.numerics.cast import amax_of, cast, uncast
from fp8train.numerics.formats import dtype_of
from fp8train.numerics.scale import MAX_EXPONENT, scale_from_amax
from fp8train.precision.gradients import Algorithm
from fp8train.precision.number_formats import E4M3, Format
from fp8train.precision.operand_cast import QuantSpec


@dataclass(frozen=True)
class ReducedBucket:
    """The reduced gradients of a bucket, whole or this rank's chunk of them.

    The bucket's tensors lie one after the other in a flat payload. After an all-reduce ``codes`` is all of
    it; after a reduce-scatter it is the part that starts at ``offset`` and may end in zeros that belong to no
    tensor.

    Attributes:
        codes: FP8 [length].
        scale_inv: FP32 [num tensors]; NaN where a rank's gradient was not finite.
        saturated: int64 [num tensors], codes at ±max among those held here.
        offset: place of ``codes[0]`` in the flat payload.
        starts: for each tensor, the place of its first element that is here, counted within the tensor.
        bounds: for each tensor, (begin, end) of its elements in ``codes``; empty if none is here.
    """

    codes: Tensor
    scale_inv: Tensor
    saturated: Tensor
    offset: int
    starts: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]

    @property
    def finite(self) -> Tensor:
        """Whether each tensor was finite on every rank: bool [num tensors]."""
        return self.scale_inv.isfinite()

    def payload(self, index: int) -> Tensor:
        """Codes of tensor ``index`` that are here: FP8, flat, a view."""
        begin, end = self.bounds[index]
        return self.codes[begin:end]

    def values(self, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of tensor ``index`` that are here, ``payload(index) · scale_inv``: flat, in ``dtype``."""
        return uncast(self.payload(index), self.scale_inv[index], dtype)


class PayloadOrder(Protocol):
    """How the elements of a bucket are dealt out to the ranks of a reduce-scatter.

    Attributes:
        held: for each tensor, the place of its elements in this rank's chunk.
        starts: for each tensor, the first of its elements that is there.
    """

    @property
    def held(self) -> Sequence[slice]:
        """For each tensor, the place of its elements in this rank's chunk."""
        ...

    @property
    def starts(self) -> Sequence[int]:
        """For each tensor, the index of its first element in this rank's chunk, counted within the tensor."""
        ...

    def arrange(self, x: Tensor) -> Tensor:
        """Elements [n] of all tensors in turn -> chunks of one length, by rank [N · length]."""
        ...


class SharedScaleReduction:
    """Reduces one bucket of gradients with shared scales, in three calls that can run beside backward.

    ``start()`` when the bucket is full: sends amax. ``send()`` some time later: casts, releases the gradients
    and sends the payload. ``finish()`` before the result is needed. All ranks must start, send and finish
    their buckets in one order. A store that overlaps with backward calls ``start()`` of bucket i and then
    ``send()`` of bucket i - 1, whose scales have arrived meanwhile.

    With ``native`` both messages are under way while backward goes on. ``ring`` and ``tree`` are emulations:
    ``send()`` returns when the last hop is done (on CUDA: is queued).
    """

    def __init__(
        self,
        gradients: Sequence[Tensor],
        mus: Tensor,
        group: CountedGroup,
        *,
        fmt: Format = E4M3,
        algorithm: Algorithm = "ring",
        average: bool = False,
        scatter: bool = False,
        purpose: str = "gradient",
        on_cast: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
        agree: CountedGroup | None = None,
        order: PayloadOrder | None = None,
    ) -> None:
        """Describe the reduction; nothing is sent yet.

        Args:
            gradients: the bucket's tensors, any shapes, FP32 or BF16, one scale each; the same shapes on all
                ranks. Not to be changed until :meth:`send` returns.
            mus: FP32 [num tensors], the same on all ranks, in (0, 1]; read by :meth:`send`.
            group: the ranks to sum over.
            fmt: payload format.
            algorithm: who adds, see :mod:`fp8train.comm.fp8_all_reduce`.
            average: the mean over ranks (Eq. 6) instead of the sum. Leave it off where each rank's loss is
                divided by the *global* token count: then the sum is the gradient.
            scatter: reduce-scatter: the result is this rank's chunk of the flat payload.
            purpose: name in the byte counters; the scales count as ``<purpose>_scale``.
            on_cast: called by :meth:`send` with each tensor's index, its flat values, their codes before any
                are added, and ``scale_inv``; must not change them.
            agree: ranks whose largest amax sets the scales; by default those that are summed over. More of
                them where ranks hold parts of the tensors.
            order: which elements a chunk of a reduce-scatter has; by default those of equal parts.

        Raises:
            ValueError: no gradients, ``mus`` of another shape or dtype, an unknown algorithm, or ``native``
                where NCCL does not offer it.
        """
        if not gradients:
            raise ValueError("a bucket needs at least one gradient")
        if mus.shape != (len(gradients),) or mus.dtype != torch.float32:
            raise ValueError(
                f"mus: {mus.dtype} {tuple(mus.shape)}; {len(gradients)} gradients need float32 "
                f"({len(gradients)},)"
            )
        if algorithm not in (legal := get_args(Algorithm)):
            raise ValueError(f"algorithm: {algorithm!r}; legal: {', '.join(legal)}")
        if algorithm == "native":
            fp8_all_reduce.check_native(gradients[0].device)
        self._gradients: Sequence[Tensor] = gradients
        self._numels = [gradient.numel() for gradient in gradients]
        self._mus, self._group, self._fmt = mus, group, fmt
        self._average, self._scatter, self._purpose = average, scatter, purpose
        self._algorithm, self._on_cast = algorithm, on_cast
        self._agree, self._order = group if agree is None else agree, order
        assert order is None or scatter, "an order of chunks belongs to a reduce-scatter"
        self._wait_for_amax: Callable[[], None] | None = None
        self._wait_for_sum: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def start(self) -> None:
        """Take each tensor's amax and start their MAX all-reduce (Eq. 4); does not wait."""
        assert self._wait_for_amax is None, "started twice"
        amax = torch.stack([amax_of(gradient) for gradient in self._gradients])
        self._amax = torch.where(amax.isfinite(), amax, torch.inf)
        self._wait_for_amax = self._agree.all_reduce(
            self._amax, purpose=f"{self._purpose}_scale", op=dist.ReduceOp.MAX
        )

    @torch.no_grad()
    def send(self) -> None:
        """Cast with the shared scales (Eqs. 3 and 5) and start the FP8 sum; the gradients are free then."""
        assert self._wait_for_amax is not None, "send before start"
        assert self._wait_for_sum is None, "sent twice"
        self._wait_for_amax()
        scale, self._scale_inv = shared_scales(self._amax, self._mus, self._fmt)
        length = chunk_length(sum(self._numels), self._group.size)
        codes = torch.zeros(self._group.size * length, dtype=torch.uint8, device=self._amax.device)
        codes = codes.view(dtype_of(self._fmt))
        begin = 0
        for index, gradient in enumerate(self._gradients):
            end = begin + gradient.numel()
            codes[begin:end].copy_(cast(gradient.reshape(-1), self._fmt, scale[index]))
            if self._on_cast is not None:
                self._on_cast(index, gradient.reshape(-1), codes[begin:end], self._scale_inv[index])
            begin = end
        self._gradients = ()
        if self._order is not None:
            codes = self._order.arrange(codes[:begin].view(torch.uint8)).view(dtype_of(self._fmt))
        add = fp8_all_reduce.reduce_scatter if self._scatter else fp8_all_reduce.all_reduce
        self._wait_for_sum = add(codes, self._group, self._algorithm, purpose=self._purpose)

    @torch.no_grad()
    def finish(self) -> ReducedBucket:
        """Wait for the sum and return it; sends first if :meth:`send` was not called."""
        if self._wait_for_sum is None:
            self.send()
        assert self._wait_for_sum is not None
        codes = self._wait_for_sum()
        if not self._scatter:
            codes = codes[: sum(self._numels)]  # without the padding
        offset = self._group.rank * len(codes) if self._scatter else 0
        if self._order is None:
            starts, bounds = _overlap(self._numels, offset, len(codes))
        else:
            bounds = tuple((place.start, place.stop) for place in self._order.held)
            starts = tuple(self._order.starts)
        scale_inv = self._scale_inv / self._group.size if self._average else self._scale_inv
        counts = torch.stack([count_at_maximum(codes[begin:end]) for begin, end in bounds])
        return ReducedBucket(codes, scale_inv, counts, offset, starts, bounds)


def shared_scales(amax: Tensor, mus: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """``pow2(max / amax) · μ`` and its inverse.

    Args:
        amax: FP32 [num tensors], the largest over the ranks; infinity or NaN where one was not finite.
        mus: FP32 [num tensors] in (0, 1].
        fmt: payload format.

    Returns:
        (scale, scale_inv) FP32 [num tensors]. ``scale`` is finite and at least 2^-126; ``scale_inv`` is NaN
        where amax is not finite.
    """
    power, inverse = scale_from_amax(amax, QuantSpec(fmt))
    scale = (power * mus).clamp(min=2.0**-MAX_EXPONENT)
    return scale, torch.where(inverse.isnan(), inverse, scale.reciprocal())


def _overlap(
    numels: Sequence[int], offset: int, length: int
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(starts, bounds) of a :class:`ReducedBucket` that holds [offset, offset + length) of the payload."""
    ends = list(accumulate(numels))
    begins = [end - numel for end, numel in zip(ends, numels, strict=True)]
    inside = [
        (min(max(begin, offset), offset + length), max(offset, min(end, offset + length)))
        for begin, end in zip(begins, ends, strict=True)
    ]
    starts = tuple(max(0, lo - begin) for (lo, _), begin in zip(inside, begins, strict=True))
    return starts, tuple((lo - offset, max(lo, hi) - offset) for lo, hi in inside)
