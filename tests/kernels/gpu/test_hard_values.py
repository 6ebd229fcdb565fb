"""Every operation with what no model should give it: NaN, infinities and values at the ends of the range in
each argument in turn, and arguments without elements.

The launcher must treat them as the reference does. Arguments are one case of ``tools/kernel_cases.py`` for
each operation, so a new operation is checked from the day it has a case. Subnormal BF16 numbers are left
out: Triton's interpreter rounds to them wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fp8train.kernels.fused_op import OPERATIONS, FusedOp
from tests.kernels.gpu.same import same
from tools.kernel_cases import FFN, Case, cases

SCALE = 4096  # leading sizes of the cases are divided by it
NARROW = 16  # and by it the width of an MLP, which the interpreter takes seconds for
RANKS = 8  # the number of messages in a case
ROUNDS = ("residual_norm", "norm_backward", "swiglu", "gelu", "softmax")
"""Operations that sum along rows or take exponentials: equal but for roundings."""
TOLERANCES = {1: (0.126, 2**-9), 2: (2**-6, 1e-4), 4: (3e-5, 3e-7), 8: (1e-9, 1e-11)}
"""Relative and absolute, by bytes of an element: a code may fall to its neighbour, an eighth away."""
MORE_OFTEN_FINITE = {
    "gelu": "on a CPU torch's own GELU is not finite at 3e38, and NaN at infinity",
    "softmax_statistics": "a NaN is no maximum, but makes the sum NaN",
}
"""Operations whose launcher may give another number where the reference is not finite, and why."""
FIRST = list({case.operation: case for case in reversed(cases()) if case.remade is None}.values())[::-1]
"""One case of each operation that is given tensors: not of the optimizer, which is given addresses, and
finite gradients only."""
SECONDS = ("heads_grad", "cast_blocks")
"""Operations that take the interpreter seconds: with infinities, the milder values, in slow runs only."""
HARD = {"infinities": (torch.inf, -torch.inf), "nan and ends": (torch.nan, -0.0, 1e-30, 3e38, -3e38)}


def operation_of(case: Case) -> FusedOp:
    return OPERATIONS[f"fp8train::{case.operation}"]


def results(run: Any, arguments: Any) -> list[Tensor]:
    """What a call returns, and what it leaves in its arguments."""
    own = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)
    returned = run(*own)
    return [x for x in tree_leaves((returned, own)) if isinstance(x, Tensor)]


def check_equal(case: Case, ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    if ours.shape != theirs.shape:  # partial results: as many as there were programs
        assert ours.dim() == theirs.dim() == 1
        ours, theirs = ours.amax().view(1), theirs.amax().view(1)
    if case.operation.startswith(tuple(MORE_OFTEN_FINITE)):
        ours = torch.where(theirs.float().isfinite(), ours.float(), theirs.float()).to(ours.dtype)
    if same(ours, theirs):
        return
    if theirs.dtype == torch.float64:  # partial sums: the sums count
        ours, theirs = ours.sum(-1), theirs.sum(-1)
    else:
        assert case.operation.startswith(ROUNDS), "not the same bits"
    rtol, atol = TOLERANCES[theirs.element_size()]
    assert torch.allclose(ours.double(), theirs.double(), rtol=rtol, atol=atol, equal_nan=True)


def hard(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """``x`` with these values in its first rows."""
    x = x.clone()
    flat = x.view(-1) if x.is_contiguous() else x.mT.contiguous().view(-1)
    for number, value in enumerate(values):
        flat[(11 + 37 * number) % flat.numel()] = value
    return flat.view(x.shape) if x.is_contiguous() else flat.view(x.mT.shape).mT


def narrowed(arguments: Any) -> Any:
    """The arguments with a narrower MLP."""

    def narrow(x: Any) -> Any:
        is_wide = isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] in (FFN, 2 * FFN)
        return x[:, : x.shape[1] // NARROW].contiguous() if is_wide else x

    return tree_map(narrow, arguments)


def placed(arguments: Any, values: tuple[float, ...]) -> Iterator[Any]:
    """The arguments, with these values in one argument of wide floats after the other."""
    for number, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.element_size() > 1:
            changed = list(arguments)
            changed[number] = hard(argument, values)
            yield tuple(changed)


def check(case: Case, arguments: Any) -> None:
    operation = operation_of(case)
    expected = results(operation.reference, arguments)
    for ours, theirs in zip(results(operation.launch, arguments), expected, strict=True):
        check_equal(case, ours, theirs)


@pytest.mark.parametrize(
    ("case", "values"),
    [
        pytest.param(
            case,
            values,
            id=f"{case}-{name}",
            marks=[pytest.mark.slow] if name == "infinities" and case.operation.startswith(SECONDS) else [],
        )
        for case in FIRST
        for name, values in HARD.items()
    ],
)
def test_hard_values_are_treated_as_the_reference_treats_them(case: Case, values: tuple[float, ...]) -> None:
    for arguments in placed(narrowed(case.filled(torch.device("cpu"), scale=SCALE)), values):
        check(case, arguments)


def emptied(case: Case) -> tuple[Any, ...]:
    """The case's arguments without tokens, or without blocks."""
    tensors = [x for x in case.arguments if isinstance(x, Tensor)]
    counted = {x.shape[0] for x in tensors if x.dim() > 1 and x.shape[0] > RANKS}
    counted |= {x.shape[1] for x in tensors if x.dim() == 2 and x.shape[0] == RANKS}

    def empty(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        leading = x.shape[:1] if x.dim() < 3 and x.shape[:1] != (RANKS,) else x.shape
        sizes = [0 if size in counted else size for size in leading]
        return torch.zeros((*sizes, *x.shape[len(sizes) :]), dtype=x.dtype)

    return tree_map(empty, case.arguments)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_arguments_without_elements(case: Case) -> None:
    arguments = emptied(case)
    assert any(isinstance(x, Tensor) and not x.numel() for x in arguments)
    check(case, arguments)
