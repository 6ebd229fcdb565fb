"""A shared-scale reduction from start to end, for tests that do not overlap it with anything."""

from __future__ import annotations

from typing import Any

from fp8train.comm.shared_scale import ReducedBucket, SharedScaleReduction


def reduce_at_once(*arguments: Any, **options: Any) -> ReducedBucket:
    reduction = SharedScaleReduction(*arguments, **options)
    reduction.start()
    return reduction.finish()
