"""Which layouts of operands a GPU is asked to write, and how often it reads what it casts. The references of
the fused operations run, and say what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.kernels import fused_op
from fp8train.kernels.optimizer_update import WIDE
from fp8train.kernels.stored_weight import StoredWeight
from fp8train.layers import fp8_operand, fp8_weight
from fp8train.layers.fp8_operand import quantize_layouts, quantize_twice
from fp8train.layers.linear import Linear
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import Granularity
from tests.kernels.gpu.same import same
from tests.layers.connecting import connect, connect_resident

ROWS, WIDTH, OUT = 40, 64, 48
DIRECTED: tuple[Granularity, ...] = ("row", "block_1x128", "mx_1x32")
ALONE = (None, None)


def directed(granularity: Granularity) -> LinearQuant:
    spec = QuantSpec(E4M3, granularity)
    return LinearQuant(*[spec] * 6, keep_x="second_copy", keep_w="second_copy")


class Asked:
    """What fused operations were asked for, in order: their names, and the layouts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool, bool]] = []
        for module, name in (
            (fp8_operand, "cast_operand"),
            (fp8_operand, "cast_groups"),
            (fp8_operand, "cast_both"),
            (fp8_weight, "turn_codes"),
            (fp8_weight, "cast_stored"),
        ):
            monkeypatch.setattr(module, name, self._noted(name, getattr(module, name)))
        for module in (fused_op, fp8_weight):
            monkeypatch.setattr(module, "fuses", lambda x: True)

    def _noted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            turned = options.get("turned", True)
            self.calls.append(
                (name, options.get("straight", True), turned is not None and turned is not False)
            )
            return operation(*args, **options)

        return call

    def take(self) -> list[tuple[str, bool, bool]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def linear(quant: LinearQuant) -> Linear:
    layer = Linear(WIDTH, OUT, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(random(OUT, WIDTH, seed=1))
    connect(layer, quant)
    return layer


BOTH, ROWS_ONLY, COLUMNS_ONLY = (True, True), (True, False), (False, True)


@pytest.mark.parametrize(
    ("quant", "forward", "backward"),
    [
        (LinearQuant(), [BOTH], [BOTH]),
        (LinearQuant(keep_x="bf16", keep_w="bf16"), [ROWS_ONLY], [BOTH, COLUMNS_ONLY, COLUMNS_ONLY]),
        (
            LinearQuant(keep_x="second_copy", grad_weight_x=QuantSpec(E4M3, margin=1)),
            [ROWS_ONLY, COLUMNS_ONLY],
            [BOTH],
        ),
        (LinearQuant(grad_weight_grad_output=QuantSpec(E5M2, margin=1)), [BOTH], [ROWS_ONLY, COLUMNS_ONLY]),
    ],
    ids=["same", "bf16", "second copy", "two gradients"],
)
def test_a_layout_that_nobody_reads_is_not_written(
    asked: Asked,
    quant: LinearQuant,
    forward: list[tuple[bool, bool]],
    backward: list[tuple[bool, bool]],
) -> None:
    layer, x = linear(quant), random(ROWS, WIDTH).requires_grad_()
    layer.quantize_weight()
    asked.take()
    with torch.no_grad():
        alone = layer(x)
    assert asked.take() == [("cast_operand", True, False)]
    y = layer(x)
    assert torch.equal(y, alone)
    assert asked.take() == [("cast_operand", *layouts) for layouts in forward]
    y.backward(random(ROWS, OUT, seed=2))
    assert sorted(asked.take()) == sorted(("cast_operand", *layouts) for layouts in backward)


def test_only_gradients_that_are_needed_have_operands(asked: Asked) -> None:
    layer, x = linear(LinearQuant()), random(ROWS, WIDTH)
    y = layer(x)
    asked.take()
    y.backward(random(ROWS, OUT))
    assert asked.take() == [("cast_operand", *COLUMNS_ONLY)]
    layer.weight.requires_grad_(False)
    y = layer(x.requires_grad_())
    asked.take()
    y.backward(random(ROWS, OUT))
    assert asked.take() == [("cast_operand", *ROWS_ONLY)]


def test_a_resident_weight_is_turned_for_backward_alone(asked: Asked) -> None:
    layer, x = Linear(WIDTH, OUT, bias=False, dtype=torch.bfloat16), random(ROWS, WIDTH)
    connect_resident(layer, LinearQuant()).fill(random(OUT, WIDTH).float())
    with torch.no_grad():
        layer(x)
    assert asked.take() == [("cast_operand", *ROWS_ONLY)]
    layer(x)
    assert ("turn_codes", True, True) in asked.take()
    layer(x)
    assert asked.take() == [("cast_operand", *BOTH)]


def test_a_stored_master_is_cast_where_it_is_known_who_reads_it(asked: Asked) -> None:
    """By the next forward, in both layouts if it trains; at once where its codes go to other ranks."""
    layer, x = Linear(WIDTH, OUT, bias=False, dtype=torch.bfloat16), random(ROWS, WIDTH)
    weight = connect_resident(layer, LinearQuant())
    master = random(OUT, WIDTH).float()
    weight.fill(master)
    expected = layer(x).detach()
    asked.take()
    stored = StoredWeight(master, None, WIDE, 1, master.abs().amax())
    assert weight.take(0, stored)
    assert asked.take() == [] and weight.backward is None
    assert torch.equal(layer(x), expected)
    assert asked.take() == [("cast_stored", *BOTH), ("cast_operand", *BOTH)]
    layer(x)
    assert asked.take() == [("cast_operand", *BOTH)]
    assert weight.forward is not None and weight.backward is not None
    assert same(*(codes for codes, _ in (weight.forward, weight.backward)))
    assert weight.take(0, stored)
    assert weight.backward is None, "between steps a weight has one layout"
    with torch.no_grad():
        layer(x)
    assert asked.take() == [("cast_stored", *ROWS_ONLY), ("cast_operand", *ROWS_ONLY)]
    weight.copies()
    assert weight.take(0, stored)
    assert asked.take() == [("cast_stored", *ROWS_ONLY)]


def test_a_weight_that_is_cast_again_in_backward_is_not_turned(asked: Asked) -> None:
    layer = Linear(WIDTH, OUT, bias=False, dtype=torch.bfloat16)
    quant = LinearQuant(keep_w="requantise", grad_input_w=QuantSpec(E4M3, margin=1))
    connect_resident(layer, quant).fill(random(OUT, WIDTH).float())
    layer(random(ROWS, WIDTH).requires_grad_()).backward(random(ROWS, OUT))
    assert not [name for name, *_ in asked.take() if name == "turn_codes"]


@pytest.mark.parametrize("granularity", DIRECTED)
def test_one_read_makes_both_casts(asked: Asked, granularity: Granularity) -> None:
    """x, w and the gradient, where scales lie along what each GEMM sums over."""
    layer, x = linear(directed(granularity)), random(ROWS, WIDTH).requires_grad_()
    with torch.no_grad():
        layer.quantize_weight()
        assert [name for name, *_ in asked.take()] == ["cast_both"]
        layer(x)
    assert asked.take() == [("cast_groups", *ROWS_ONLY)]
    y = layer(x)
    assert [name for name, *_ in asked.take()] == ["cast_both"]
    y.backward(random(ROWS, OUT))
    assert [name for name, *_ in asked.take()] == ["cast_both"]


@pytest.mark.parametrize("granularity", DIRECTED)
def test_both_casts_have_the_bits_of_two(monkeypatch: pytest.MonkeyPatch, granularity: Granularity) -> None:
    spec, x = QuantSpec(E5M2, granularity, power_of_two=granularity == "mx_1x32"), random(131, 300)
    assert quantize_twice(x, (spec, spec), None, ALONE) is None, "a CPU casts twice"
    monkeypatch.setattr(fused_op, "fuses", lambda x: True)
    both = quantize_twice(x, (spec, spec), None, ALONE)
    assert both is not None
    assert both.rows[0].is_contiguous() and both.columns[0].t().is_contiguous()
    for operand, contracted in zip(both, (1, 0), strict=True):
        alone = quantize_layouts(x, spec, contracted=contracted)[1 - contracted]
        assert all(same(a, b) for a, b in zip(operand, alone, strict=True))
    assert quantize_twice(x, (spec, QuantSpec(E4M3, granularity)), None, ALONE) is None
    assert quantize_twice(x.double(), (spec, spec), None, ALONE) is None
    assert quantize_twice(x, (spec, spec), torch.empty(8), ALONE) is None


@pytest.mark.parametrize("granularity", DIRECTED)
def test_a_layer_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, granularity: Granularity) -> None:
    found = []
    for fuse in (False, True):
        monkeypatch.setattr(fused_op, "fuses", lambda x, fuse=fuse: fuse)
        layer, x = linear(directed(granularity)), random(ROWS, WIDTH).requires_grad_()
        y = layer(x)
        y.backward(random(ROWS, OUT, seed=2))
        found.append((y.detach(), x.grad, layer.weight.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
