"""Which casts to FP8 lose most: the tensors that an event names.

A share that is saturated above 0.1 % costs accuracy at once; a share that is flushed to zero counts above
10 %, since gradients flush a few per cent in health. A source that is not finite always counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LIMITS = {"saturated": 1e-3, "flushed": 0.1}
SHOWN = 8


def worst_casts(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The fields of an event about the casts of a step; empty if none is out of range.

    Args:
        rows: statistics by cast site (:mod:`fp8train.numerics.statistics`).

    Returns:
        For each of :data:`LIMITS` that is exceeded ``{"site": .., "value": .., "casts": how many}`` of the
        worst cast; ``non_finite``, how many sources were not finite, and ``sites``, the first of them.
    """
    found: dict[str, Any] = {}
    for name, limit in LIMITS.items():
        above = {site: values[name] for site, values in rows.items() if values[name] > limit}
        if above:
            site = max(above, key=lambda one: above[one])
            found[name] = {"site": site, "value": above[site], "casts": len(above)}
    broken = [site for site, values in rows.items() if not math.isfinite(values["amax"])]
    if broken:
        found |= {"non_finite": len(broken), "sites": broken[:SHOWN]}
    return found
