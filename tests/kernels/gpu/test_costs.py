"""What operations declare of themselves, at the shapes of a model: launches, bytes, shapes of results."""

from __future__ import annotations

import pytest
from torch import Tensor

from fp8train.kernels.fused_op import OPERATIONS, nbytes
from fp8train.kernels.gpu.launch import Launch, observed
from tools.kernel_cases import Case, cases


def tensors(results: object) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return list(results) if isinstance(results, tuple) else []


@pytest.mark.parametrize("case", cases(), ids=str)
def test_launches_bytes_and_shapes_are_those_declared(case: Case) -> None:
    operation, seen = OPERATIONS[f"fp8train::{case.operation}"], list[Launch]()
    with observed(lambda launch: bool(seen.append(launch))):
        launched = operation.launch(*case.arguments)
    announced = operation(*case.arguments)
    for ours, fake in zip(tensors(launched), tensors(announced), strict=True):
        assert (ours.shape, ours.dtype) == (fake.shape, fake.dtype)
    cost = operation.cost(case.arguments, announced)
    assert cost.launches == len(seen) and cost.moved == cost.read + cost.written
    inputs = {id(x): x for x in case.arguments if isinstance(x, Tensor)}
    if not operation.mutates:  # all of the results, and what launches exchange
        between = cost.written - nbytes(*tensors(announced))
        assert 0 <= between <= 0.25 * cost.written
        assert nbytes(*inputs.values()) <= cost.read
    for launch in seen:
        assert all(size < 65_536 for size in launch.grid[1:])


def test_every_operation_has_a_case() -> None:
    assert {case.operation for case in cases()} == {name.partition("::")[2] for name in OPERATIONS}
