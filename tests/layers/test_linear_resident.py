"""Weights that exist in FP8 alone: bit-equal to quantised masters, written in pieces, nothing else stored."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp8train.kernels.padding import aligned, pad_to
from fp8train.layers.fp8_weight import ResidentFp8Weight
from fp8train.layers.linear import Linear, SinkSlot
from fp8train.numerics.cast import amax_of, quantize
from fp8train.numerics.grad_sink import register_sink
from fp8train.numerics.scale_state import ScaleState
from fp8train.numerics.statistics import FIELDS, CastRecorder, cast_statistics
from fp8train.optim.weight_target import WeightTarget
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.layers.connecting import CPU, connect, connect_resident, state_of

SHAPES = [(48, 32), (24, 40), (33, 17), (3, 5)]  # [N, K]: aligned, and three that need padding
SPACED = QuantSpec(E4M3, margin=1)
QUANTS = {
    "same": LinearQuant(),
    "requantise": LinearQuant(keep_w="requantise", grad_input_w=SPACED),
    "second copy": LinearQuant(keep_w="second_copy", grad_input_w=SPACED),
    "free scale": LinearQuant(
        output_w=QuantSpec(E4M3, power_of_two=False), grad_input_w=QuantSpec(E4M3, power_of_two=False)
    ),
    "e5m2": LinearQuant(output_w=QuantSpec(E5M2), keep_w="second_copy", grad_input_w=SPACED, keep_x="bf16"),
    "constant": LinearQuant(
        output_w=QuantSpec(E4M3, scale_source="constant", constant_exponent=9),
        grad_input_w=QuantSpec(E4M3, scale_source="constant", constant_exponent=9),
    ),
}


def normal(*shape: int, seed: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


NAME = "layers.0.mlp.up"


def make(shape: tuple[int, int], *, dtype: torch.dtype, bias: bool = False) -> Linear:
    layer = Linear(shape[1], shape[0], bias=bias, dtype=dtype, name=NAME)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def resident(
    shape: tuple[int, int],
    quant: LinearQuant,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scale_state: ScaleState | None = None,
    recorder: CastRecorder | None = None,
) -> tuple[Linear, ResidentFp8Weight]:
    layer = make(shape, dtype=dtype)
    return layer, connect_resident(layer, quant, scale_state=scale_state, recorder=recorder)


def publish(target: WeightTarget, master: Tensor, cuts: Sequence[int] = ()) -> None:
    """What an optimizer does: amax first, then the pieces in order."""
    flat = master.reshape(-1)
    target.begin(amax_of(flat))
    edges = [0, *cuts, flat.numel()]
    for start, stop in itertools.pairwise(edges):
        target.write(start, stop, flat[start:stop].clone())
    target.end()


def bits(operand: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    assert operand is not None
    return operand[0].view(torch.uint8), operand[1]


def expected_operand(master: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    payload, scale_inv = quantize(master, spec)
    return pad_to(payload, aligned(master.shape[0]), aligned(master.shape[1])).view(torch.uint8), scale_inv


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_payload_is_the_quantised_master(name: str, shape: tuple[int, int]) -> None:
    """The master is rounded once, to FP8; rounding it to BF16 in between gives other codes."""
    quant = QUANTS[name]
    layer, target = resident(shape, quant)
    for step in range(3):
        master = normal(*shape, seed=step, std=0.02 * 4**step)
        publish(target, master)
        assert same(bits(layer._w_forward), expected_operand(master, quant.output_w))
        backward = quant.grad_input_w if quant.keep_w == "second_copy" else quant.output_w
        assert same(bits(layer._w_backward), expected_operand(master, backward))
        payload, scale_inv = quantize(master, quant.output_w)
        assert torch.equal(layer.dequantized_weight(torch.float64), payload.double() * scale_inv.double())
    twice = quantize(normal(512, 512, seed=9).bfloat16(), QuantSpec(E4M3))[0].float()
    assert not torch.equal(twice, quantize(normal(512, 512, seed=9), QuantSpec(E4M3))[0].float())


@pytest.mark.parametrize("name", ["same", "second copy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_may_be_cut_anywhere(name: str, shape: tuple[int, int]) -> None:
    quant = QUANTS[name]
    size = shape[0] * shape[1]
    master = normal(*shape, seed=4)
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(size + 1, (7,), generator=generator).sort().values.tolist()
    for cuts in ([1], [size - 1], [shape[1]], [2, 2, 3], list(range(1, size)), random):
        layer, target = resident(shape, quant)
        publish(target, master, cuts)
        assert same(bits(layer._w_forward), expected_operand(master, quant.output_w))
    target.fill(master * 3)
    assert same(bits(layer._w_forward), expected_operand(master * 3, quant.output_w))


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_sink", [False, True], ids=["autograd", "sink"])
def test_forward_and_backward_equal_a_quantised_weight(
    name: str, dtype: torch.dtype, with_sink: bool
) -> None:
    """Masters that the compute dtype holds exactly, so that a layer with its own weight casts the same."""
    shape = SHAPES[1]
    master = normal(*shape, seed=5, std=0.05).to(torch.bfloat16).to(torch.float32)
    found = []
    for held in (False, True):
        layer = make(shape, dtype=dtype, bias=True)
        sink = Sink(layer) if with_sink else None
        slot = None if sink is None else sink.slot
        if held:
            publish(connect_resident(layer, QUANTS[name], sink_slot=slot), master, [7, 100])
        else:
            connect(layer, QUANTS[name], sink_slot=slot)
            with torch.no_grad():
                layer.weight.copy_(master)
        x = normal(3, 7, shape[1], seed=6, dtype=dtype).requires_grad_()
        output = layer(x)
        output.backward(normal(3, 7, shape[0], seed=7, std=1e-3, dtype=dtype))
        grad_weight = layer.weight.grad if sink is None else sink.buffer
        assert (layer.weight.grad is None) is with_sink
        assert grad_weight is not None and x.grad is not None and layer.bias is not None
        assert grad_weight.shape == shape and grad_weight.is_contiguous()
        assert grad_weight.count_nonzero() > 0
        found.append([output.detach(), x.grad, grad_weight, layer.bias.grad])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a, b)


class Sink:
    """Keeps one layer's contributions."""

    def __init__(self, layer: Linear) -> None:
        self.buffer = torch.zeros(layer.weight.shape, dtype=layer.weight.dtype)
        self.slot = SinkSlot(register_sink(self), torch.tensor(0), self.buffer)

    @torch.no_grad()
    def contribute(self, slot: int, compute: Callable[[], Tensor]) -> None:
        self.buffer.add_(compute())


def test_the_parameter_has_no_storage_and_no_values() -> None:
    layer = make((48, 32), dtype=torch.bfloat16)
    before = layer.weight
    target = connect_resident(layer, LinearQuant())
    assert layer.weight is before
    assert dict(layer.named_parameters())["weight"] is before
    assert before.requires_grad and isinstance(before, nn.Parameter)
    assert (tuple(before.shape), before.numel(), before.dtype) == ((48, 32), 48 * 32, torch.bfloat16)
    assert before.untyped_storage().nbytes() == 2
    assert before.isnan().all()
    with torch.no_grad():
        for write in (before.copy_, before.add_, before.mul_):
            with pytest.raises(RuntimeError, match="single memory location"):
                write(torch.ones(48, 32))
    assert before.isnan().all()
    publish(target, normal(48, 32, seed=1))
    payload, scale_inv = bits(layer._w_forward)
    assert (payload.nbytes, scale_inv.nbytes) == (48 * 32, 4)
    pointer = payload.data_ptr()
    publish(target, normal(48, 32, seed=2))
    assert bits(layer._w_forward)[0].data_ptr() == pointer  # written in place
    layer.quantize_weight()
    assert bits(layer._w_forward)[0].data_ptr() == pointer


def test_nothing_runs_before_the_first_weight() -> None:
    layer, target = resident((48, 32), LinearQuant())
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.up: no FP8 weight"):
        layer(normal(2, 32, seed=1, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="not written yet"):
        layer.dequantized_weight()
    target.begin(torch.tensor(1.0))
    with pytest.raises(AssertionError):
        layer(normal(2, 32, seed=1, dtype=torch.bfloat16))


def test_a_weight_that_backward_needs_in_bf16_is_refused() -> None:
    layer = make((48, 32), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="keep_w: bf16 needs weights in the compute type"):
        connect_resident(layer, LinearQuant(keep_w="bf16"))
    assert not layer.fp8_weight_is_resident
    assert layer.weight.untyped_storage().nbytes() == 48 * 32 * 2


def test_a_new_weight_between_forward_and_backward_is_an_error() -> None:
    """Backward would multiply by a weight that the forward did not see."""
    layer, target = resident((48, 32), LinearQuant(), dtype=torch.float32)
    target.fill(normal(48, 32, seed=1))
    output = layer(normal(2, 32, seed=1).requires_grad_())
    target.fill(normal(48, 32, seed=2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_master_poisons_the_product(value: float) -> None:
    layer, target = resident((48, 32), LinearQuant(), dtype=torch.float32)
    master = normal(48, 32, seed=1)
    master[3, 4] = value
    target.fill(master)
    assert layer(normal(2, 32, seed=1)).isnan().all()
    target.fill(normal(48, 32, seed=1))
    assert layer(normal(2, 32, seed=1)).isfinite().all()


def test_delayed_scale() -> None:
    """The scale comes from the weights of the steps before; training forwards report this one's amax."""
    spec = QuantSpec(E4M3, scale_source="delayed", history=2)
    quant = replace(LinearQuant(), output_w=spec, grad_input_w=spec)
    state = state_of({NAME: quant})
    assert state.names == ["layers.0.mlp.up/output.w"]
    layer, target = resident((24, 40), quant, scale_state=state)
    masters = [normal(24, 40, seed=seed, std=std) for seed, std in enumerate((1.0, 8.0, 0.1, 0.1, 0.1))]
    amaxes = [float(master.abs().max()) for master in masters]
    x = normal(2, 40, seed=1, dtype=torch.bfloat16)
    for step, master in enumerate(masters):
        publish(target, master, [100])
        seen = amaxes[max(0, step - 2) : step] or amaxes[:1]
        exponent = math.floor(math.log2(448 / max(seen)))
        constant = QuantSpec(E4M3, scale_source="constant", constant_exponent=exponent)
        assert same(bits(layer._w_forward), expected_operand(master, constant))
        layer(x)
        assert not state.amaxes.any() or step  # an evaluation records nothing
        with state.recording():
            layer(x)
            layer(x)
        assert state.amaxes.tolist() == [amaxes[step]]
        state.advance(lambda tensor: None, applied=True)


@pytest.mark.parametrize("cuts", [[], [5, 300, 301]])
@pytest.mark.parametrize("kind", ["normal", "exact", "zero", "saturating", "nan"])
def test_statistics_of_a_weight_written_in_pieces(cuts: list[int], kind: str) -> None:
    master = normal(24, 40, seed=3)
    spec = QuantSpec(E4M3)
    master.view(-1)[::7] = 0
    master.view(-1)[1::7] *= 1e-6
    if kind == "exact":
        master = master.sign()
    elif kind == "zero":
        master.zero_()
    elif kind == "saturating":
        spec = QuantSpec(E4M3, scale_source="constant", constant_exponent=9)
    elif kind == "nan":
        master[2, 2] = math.nan
    recorder = CastRecorder([f"{NAME}/{operand}" for operand in ("x", "w", "grad_output")], CPU)
    quant = LinearQuant(output_w=spec, grad_input_w=spec)
    layer, target = resident((24, 40), quant, recorder=recorder)
    publish(target, master, cuts)
    assert recorder.collect() == {}
    recorder.active = True
    publish(target, master, cuts)
    layer.record_weight()  # changes nothing: the source is gone
    row = recorder.row(f"{NAME}/w")
    expected = cast_statistics(master, *quantize(master, spec))
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if kind == "saturating":
        assert 0.1 < float(row[FIELDS.index("saturated")]) < 0.9


def test_state_dict_shows_the_values() -> None:
    layer, target = resident((24, 40), LinearQuant(), dtype=torch.float32)
    target.fill(normal(24, 40, seed=1))
    saved = layer.state_dict()["weight"]
    payload, scale_inv = quantize(normal(24, 40, seed=1), QuantSpec(E4M3))
    assert torch.equal(saved, payload.float() * scale_inv)
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"weight": saved})


def test_module_operations() -> None:
    layer, target = resident((24, 40), LinearQuant(), dtype=torch.float32)
    target.fill(normal(24, 40, seed=1))
    x = normal(2, 40, seed=2)
    expected = layer(x)
    assert torch.equal(layer.to("cpu").float()(x), expected)
    assert layer.weight.untyped_storage().nbytes() == 4
    target.fill(normal(24, 40, seed=1))  # still the same target
    assert torch.equal(layer(x), expected)
    twin = copy.deepcopy(layer)
    target.fill(normal(24, 40, seed=3))
    assert torch.equal(twin(x), expected)
    assert not torch.equal(layer(x), expected)
    with pytest.raises(TypeError, match="runs in FP8"):
        layer.bfloat16()


def test_print_says_so() -> None:
    layer, _ = resident((24, 40), LinearQuant())
    recipe = "x=e4m3:cur/tensor/pow2 w=e4m3:cur/tensor/pow2 grad_output=e5m2:cur/tensor/pow2"
    assert repr(layer) == f"Linear(40 -> 24, bias=False, fp8[{recipe}], weight resident in fp8)"
