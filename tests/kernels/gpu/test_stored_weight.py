"""The launcher of weights cast from stored masters against its reference, and that against the pieces that an
optimizer writes on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels import stored_weight
from fp8train.kernels.operands import CastRule
from fp8train.kernels.stored_weight import StoredWeight
from fp8train.layers.fp8_weight import ResidentFp8Weight
from fp8train.numerics.scale_state import ScaleSlot
from fp8train.optim.make_storage import make_storage
from fp8train.optim.state_storage import StatePlace, Storage
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import block_size
from fp8train.precision.state_formats import StateFormat
from tests.kernels.gpu.same import same

MASTERS = [StateFormat(name) for name in ("fp16_scaled", "e4m3", "e5m2", "fp32", "bf16", "bf16_remainder")]
SHAPES = [(16, 128), (5, 257), (6, 192), (3, 40), (70, 130)]
SPECS = [
    QuantSpec(E4M3),
    QuantSpec(E4M3, power_of_two=False),
    QuantSpec(E5M2, scale_source="constant", constant_exponent=3),
]


def stored(fmt: StateFormat, shape: tuple[int, int]) -> tuple[Storage, StoredWeight]:
    block = block_size(shape[1]) if fmt.in_blocks else 1
    storage = make_storage(fmt, StatePlace(shape, block, 0, torch.device("cpu")), wide=torch.float32)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).view(-1)
    storage.store(0, values.numel(), values, None)
    memory = storage.stored()
    assert memory is not None
    amax = storage.load(0, values.numel()).abs().amax()
    return storage, StoredWeight(memory.payload, memory.scale, memory.mantissa, block, amax)


def results(shape: tuple[int, int], first_row: int, *, both: bool) -> tuple[Tensor, ...]:
    rows, columns = (-(-size // 16) * 16 for size in (shape[0] + first_row, shape[1]))
    codes = torch.full((rows, columns), 1, dtype=torch.uint8)
    turned = torch.full((columns, rows) if both else (0,), 1, dtype=torch.uint8)
    numbers = (torch.zeros(()), torch.zeros(()), torch.zeros(()))
    return codes.view(torch.float8_e4m3fn), turned.view(torch.float8_e4m3fn), *numbers


@pytest.mark.parametrize("both", [False, True], ids=["one layout", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", MASTERS, ids=str)
def test_the_kernel_has_the_bits_of_the_reference(
    fmt: StateFormat, shape: tuple[int, int], both: bool
) -> None:
    _, weight = stored(fmt, shape)
    for number, spec in enumerate(SPECS):
        first_row, delayed = (0, 3)[number % 2], torch.tensor(0.5) if number == 0 else None
        ours, theirs = (results(shape, first_row, both=both) for _ in range(2))
        for outputs, run in ((ours, stored_weight._cast_op.launch), (theirs, stored_weight._cast_stored)):
            run(*outputs, *weight, delayed, first_row, *CastRule.of(spec))
        for one, other in zip(ours, theirs, strict=True):
            assert same(one, other)
        if both:
            assert same(ours[1], ours[0].t())
        untouched = ours[0].view(torch.uint8).clone()
        untouched[first_row : first_row + shape[0], : shape[1]] = 1
        assert (untouched == 1).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", MASTERS, ids=str)
@pytest.mark.parametrize("known", [0.0, 2.0])
def test_taking_a_master_is_writing_its_pieces(
    fmt: StateFormat, shape: tuple[int, int], known: float
) -> None:
    storage, weight = stored(fmt, shape)
    delayed = QuantSpec(E4M3, scale_source="delayed")
    quant = LinearQuant(output_w=delayed, grad_input_w=QuantSpec(E4M3, margin=1), keep_w="second_copy")
    slots = {"output.w": ScaleSlot(torch.tensor(known), torch.zeros(()))}
    taken, written = (
        ResidentFp8Weight(quant, torch.Size(shape), torch.device("cpu"), slots=slots) for _ in range(2)
    )
    assert taken.take(0, weight)
    written.begin(weight.amax)
    written.write(0, storage.place.numel, storage.load(0, storage.place.numel))
    written.end()
    for one, other in zip(taken.copies(), written.copies(), strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert taken.forward is not None and taken.backward is not None
    assert same(taken._amax, written._amax)
