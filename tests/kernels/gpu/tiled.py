"""What every formula of :class:`~fp8train.kernels.tiled.TiledValues` is checked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.operands import CastRule, cast_operand
from fp8train.kernels.tiled import TiledValues
from tests.kernels.gpu.same import same


def check_launchers(formula: TiledValues, inputs: tuple[Any, ...], rule: CastRule) -> Tensor:
    """That launchers of amax and cast give what forward's values say, in shapes that were announced.

    Returns:
        The values, [M, N].
    """
    forward, amax, cast = formula.operations
    values: Tensor = forward.launch(*inputs)
    partials: Tensor = amax.launch(*inputs)
    operand = cast.launch(*inputs, partials, None, *rule, True, True)
    assert same(partials.abs().amax(), values.float().abs().amax() if values.numel() else torch.zeros(()))
    for ours, theirs in zip(operand, cast_operand(values, partials, rule, turned=True), strict=True):
        assert same(ours, theirs)
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in inputs]
    announced = (
        formula.forward(*meta),
        formula.amax(*meta),
        *formula.cast(*meta, partials=partials.to("meta"), rule=rule, turned=True),
    )
    for ours, fake in zip((values, partials, *operand), announced, strict=True):
        assert ours.shape == fake.shape and ours.dtype == fake.dtype
    return values


def check_references(formula: TiledValues, inputs: tuple[Any, ...], rule: CastRule) -> Tensor:
    """The same of what runs without Triton."""
    values = formula.forward(*inputs)
    partials = formula.amax(*inputs)
    operand = formula.cast(*inputs, partials=partials, rule=rule, turned=True)
    assert same(partials.amax(), values.float().abs().amax() if values.numel() else torch.zeros(()))
    for ours, theirs in zip(operand, cast_operand(values, partials, rule, turned=True), strict=True):
        assert same(ours, theirs)
    return values
