"""Which optimizer states travel between host and device together: arithmetic, without torch.

States of consecutive parameters form a *load*, which fits a slot of device memory. Loads are what ranks that
agree on amaxes must have in common, so they follow from the model's parameters and the number of ranks that
share their states, not from what a rank keeps. A parameter that is larger than a slot is a load of its own;
where nothing spans its rows it comes in pieces, else the slot grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fp8train.precision.state_formats import StateFormat
from fp8train.update_rules.rule import ALIGNMENT

SLOTS = 3
"""Of device memory: one is filled and one emptied while the states in the third are updated."""
SLOT_BYTES = 1 << 27
"""128 MiB: 5 ms of PCIe 4.0, where starting a copy takes some 10 us."""

_TENSOR_ALIGNMENT = 256
_WIDTHS = {"fp64": 8, "fp32": 4, "bf16_remainder": 4, "bf16": 2, "fp16_scaled": 2, "e4m3": 1, "e5m2": 1}


def element_bytes(fmt: StateFormat) -> int:
    """Bytes of an element of a state, without scales; FP32 also where it stands for FP64."""
    return _WIDTHS[fmt.format]


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes of a slot or of the host's memory."""
    return -(-nbytes // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT


def slot_sizes(loads: Sequence[int]) -> list[int]:
    """Bytes of each slot, for the bytes of all loads, which take slots in turn."""
    return [max(loads[slot::SLOTS], default=0) for slot in range(SLOTS)]


def unit_of_rows(row: int, blocks: Iterable[int]) -> int:
    """Rows of a piece are a multiple of this, as chunks of a pass are of elements: whole blocks and vectors.

    Args:
        row: elements of a row.
        blocks: elements of a block, of each state.
    """
    unit = math.lcm(ALIGNMENT, *(block if row % block == 0 else row for block in blocks))
    return math.lcm(unit, row) // row


def loads(sizes: Mapping[str, float], most: float) -> list[tuple[str, ...]]:
    """Names in loads of at most ``most`` bytes, in their order; a larger one alone.

    Args:
        sizes: bytes by name.
        most: bytes of a load.
    """
    found: list[list[str]] = []
    room = 0.0
    for name, size in sizes.items():
        if size > room or not found:
            found.append([])
            room = most
        found[-1].append(name)
        room -= size
    return [tuple(names) for names in found]


def pieces(rows: int, nbytes: int, most: int, unit: int) -> list[tuple[int, int]]:
    """(first, last) rows of the pieces that a parameter comes in.

    Args:
        rows: of the parameter.
        nbytes: of its states.
        most: bytes of a piece, unless ``unit`` rows have more.
        unit: rows of a piece are a multiple of this, but for the last.
    """
    step = max(unit, most * rows // nbytes // unit * unit)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]
