"""Bytes that a rank stores of a run with ``engine: deepspeed``: computed from what its ZeRO stages cut.

Offloaded states and parameters are in host memory or on a disk; they count here like the others. Padding,
buckets and gathered parameters do not. Needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from fp8train.config.schema import Config
from fp8train.live.stored_bytes import Footprint, StoredBytes
from fp8train.update_rules.registry import rule_named

_WIDTHS = {"fp32": 4, "bf16": 2, "fp16_scaled": 2, "e4m3": 1, "e5m2": 1}
_SCALE = 4


def partitioned_bytes(
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    linears: Collection[str],
    planned: Collection[str],
    dp: int,
) -> StoredBytes:
    """Count for one rank of ``dp``.

    Args:
        config: with ``engine: deepspeed``.
        shapes: of all parameters, by FQN.
        linears: names of the matrices of hidden linears.
        planned: those in the FP8 plan.
        dp: data-parallel ranks.
    """

    def footprint(fqns: Collection[str]) -> Footprint:
        elements = sum(math.prod(shapes[fqn]) for fqn in fqns)
        in_plan = sum(math.prod(shapes[fqn]) for fqn in fqns if fqn in planned) // dp
        share, stage = elements // dp, config.parallel.zero
        values = {
            "weight": (share if stage == 3 else elements) * _WIDTHS[config.precision.compute],
            "gradient": (elements if stage == 1 else share) * _WIDTHS[config.precision.gradient.accumulate],
            "accumulator": 0,
            "master": share * _WIDTHS["fp32"],
        }
        scales = {"weight": 0, "gradient": 0}
        formats = config.state_formats.formats()
        for role in rule_named(config.optimizer.name).roles()[1:]:
            fmt = formats[role]
            values[role] = in_plan * _WIDTHS[fmt.format] + (share - in_plan) * _WIDTHS["fp32"]
            scales[role] = in_plan // fmt.block * _SCALE if fmt.in_blocks else 0
        return Footprint(elements, values, scales)

    return StoredBytes(footprint(planned), footprint(linears), footprint(shapes))
