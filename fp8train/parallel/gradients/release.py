"""Gradients that are released while backward goes on: each bucket is judged, handed on and forgotten.

Without this every gradient waits for the end of backward. With it the store hands a reduced bucket to the
optimizer at once, and its place (:mod:`fp8train.parallel.gradients.bucket_plan`) goes to a later bucket.

**When.** Backward goes through the model part by part. The weights of a part may change once a contribution
of a later part is there: until then its backward, or the recomputation of its forward, may read them. What is
left at the end of backward is handed on then. A bucket's place is needed no sooner, by the plan.

**Whether.** A bucket is judged by its own sums of squares. One that is not finite is not handed on, and no
later one of the step is: backward made them of the same activations. Earlier ones are on their way already,
so a step may be taken *partly*. Buckets are judged in launch order, and ranks that have other parts of a
gradient judge together, so all ranks stop at the same bucket.

**Without waiting.** On a GPU the verdict travels to the host while the next bucket fills, and is waited for
only then, one bucket later; the launch queue does not run dry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.bucket_plan import PlannedBucket, turns_on_the_way


class _Verdict:
    """Whether a scalar is finite, on its way from the device to the host."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value, None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return math.isfinite(float(self._value))


class Release:
    """Decides when each bucket of a step is judged and handed on.

    Attributes:
        worth: device boolean, whether the step may change anything; None: it may. Set before the step.
        norms: FP64 [members] of each bucket judged so far, of this rank's rows.
        handed_on: how many buckets the optimizer has had.
        stopped: whether a bucket was not finite, or the step may not change anything.
    """

    def __init__(
        self,
        plan: Sequence[PlannedBucket],
        buckets: Sequence[Bucket],
        *,
        replicas: int,
        agree: CountedGroup | None,
        norm_dtype: torch.dtype,
        advance: Callable[[int], None],
        hand_on: Callable[[int], None],
    ) -> None:
        """Args:
        plan: of the buckets.
        buckets: in launch order.
        replicas: ranks that a sum is over.
        agree: ranks that may find others of their rows not finite; None where all have the same sums.
        norm_dtype: of the arithmetic of norms.
        advance: makes sure that the second half of the reduction of buckets below this number has begun.
        hand_on: has the optimizer update the parameters of a bucket.
        """
        self._plan, self._buckets, self._agree, self._dtype = plan, buckets, agree, norm_dtype
        self._advance, self._hand_on = advance, hand_on
        self._on_the_way = turns_on_the_way(replicas)
        self.worth: Tensor | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a step, and forget an unfinished one."""
        self.norms: list[Tensor] = []
        self._verdicts: list[_Verdict] = []
        self._open = [False] * len(self._plan)
        self._launched = self._settled = self.handed_on = 0
        self.stopped = False

    def before(self, bucket: int, part: int) -> None:
        """Make room for the first contribution to a parameter of this bucket and part of the model; hand on
        what backward of earlier parts was the last to read, if its verdict had time to arrive."""
        if not self._open[bucket]:
            self._open[bucket] = True
            after = self._plan[bucket].after
            if after is not None:
                assert self._plan[after].parts[1] < part, "the plan keeps buckets of one part apart"
                self._settle(after + 1)
            self._buckets[bucket].begin()
        while self._settled < len(self._verdicts) - 1 and self._may_change(self._settled, part):
            self._settle(self._settled + 1)

    def _may_change(self, bucket: int, part: int) -> bool:
        """Whether backward has come to a part after all those of a bucket, so that it reads their parameters
        no more."""
        return self._plan[bucket].parts[1] < part

    def launched(self, count: int) -> None:
        """So many buckets are launched: judge those whose sums should be here."""
        self._launched = count
        self.judge(count - self._on_the_way)

    def judge(self, stop: int) -> None:
        """Judge the buckets below this number; collective where ranks agree."""
        assert stop <= self._launched, f"bucket {stop - 1} is wanted before it is complete"
        for bucket in range(len(self._verdicts), stop):
            self._advance(bucket + 1)
            self._buckets[bucket].finish()
            norms = self._buckets[bucket].norms(self._dtype)
            self.norms.append(norms)
            total = norms.sum()  # finite if all are, on all ranks: norms are not negative
            if self._agree is not None and self._agree.size > 1:
                self._agree.all_reduce(total, purpose="norm")()
            if self.worth is not None:
                total = torch.where(self.worth, total, torch.nan)
            self._verdicts.append(_Verdict(total))

    def _settle(self, stop: int) -> None:
        """Hand on the buckets below this number, or drop them."""
        self.judge(stop)
        for bucket in range(self._settled, stop):
            self.stopped = self.stopped or not self._verdicts[bucket].wait()
            if not self.stopped:
                self._hand_on(bucket)
                self.handed_on += 1
            self._buckets[bucket].drop()
            self._settled += 1

    def finish(self) -> None:
        """Backward has ended: hand on the rest, or drop it."""
        self._settle(len(self._plan))
