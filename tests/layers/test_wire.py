"""With whom the scales of each operand are agreed on, by a table written from the layouts alone."""

from __future__ import annotations

from typing import Any

import pytest

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.layers.wire import Wire, wire
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.traffic import Traffic

TENSOR = QuantSpec(E4M3)
ROW = QuantSpec(E4M3, granularity="row")

# kind, operand, codes travel: tp holds other rows, tp holds other columns; cp holds other rows of tokens
CUT: dict[tuple[str, str, bool], tuple[bool, bool]] = {
    ("column", "x", False): (False, False),
    ("column", "x", True): (True, False),
    ("column", "grad_output", False): (False, True),
    ("column", "grad_output", True): (False, True),
    ("column", "w", False): (True, False),
    ("row", "x", False): (False, True),
    ("row", "x", True): (False, True),
    ("row", "grad_output", False): (False, False),
    ("row", "grad_output", True): (True, False),
    ("row", "w", False): (False, True),
    ("none", "x", False): (False, False),
    ("none", "grad_output", True): (False, False),
    ("none", "w", False): (False, False),
}


class Ranks(CountedGroup):
    """A group that is only asked for its size and name."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(None)
        self.name, self.size = name, size


def make(kind: str, *, codes: bool, tp: int = 2, cp: int = 2) -> Wire:
    traffic = Traffic(activations=codes, grad_output=codes)
    parallel = TensorParallel(Ranks("tp", tp), Ranks("tp+cp", tp * cp), Ranks("cp", cp), traffic)
    return wire(kind, parallel)  # type: ignore[arg-type]


def group_of(found: Any) -> str | None:
    return None if found is None else found.group.name


@pytest.mark.parametrize(("kind", "operand", "codes"), CUT)
def test_scales_are_agreed_on_where_what_shares_them_is_cut(kind: str, operand: str, codes: bool) -> None:
    rows_over_tp, columns_over_tp = CUT[kind, operand, codes]
    rows_over_cp = operand != "w"
    linear = make(kind, codes=codes) if kind != "none" else make(kind, codes=codes, tp=1)

    def expected(tp: bool, cp: bool) -> str | None:
        return {(True, True): "tp+cp", (True, False): "tp", (False, True): "cp"}.get((tp, cp))

    # A row of scales covers columns where the GEMM contracts dimension 1, and rows where it contracts 0.
    assert group_of(linear.agreement(operand, ROW, 1)) == expected(columns_over_tp, False)
    assert group_of(linear.agreement(operand, ROW, 0)) == expected(rows_over_tp, rows_over_cp)
    for contracted in (0, 1):
        whole = group_of(linear.agreement(operand, TENSOR, contracted))
        assert whole == expected(rows_over_tp or columns_over_tp, rows_over_cp)
        for granularity in ("block_1x128", "block_128x128", "mx_1x32"):
            blocks = QuantSpec(E4M3, granularity=granularity)  # type: ignore[arg-type]
            assert linear.agreement(operand, blocks, contracted) is None


def test_nobody_to_agree_with() -> None:
    assert wire("column", None).agreement("x", TENSOR, 1) is None
    alone = make("column", codes=True, tp=1, cp=1)
    assert alone.agreement("x", TENSOR, 1) is None
    assert (
        group_of(make("row", codes=False, cp=1).agreement("x", TENSOR, 1)) == "tp+cp"
    )  # tp alone, in effect
