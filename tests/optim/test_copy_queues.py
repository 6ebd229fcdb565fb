"""What :class:`~fp8train.optim.copy_queues.CudaCopies` asks of torch, where there is no CUDA; that copies
which are late are found out; and which states travel together."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock, call, patch

import pytest
import torch

from fp8train.optim.copy_queues import CopiesAtOnce, CudaCopies, copy_queues
from fp8train.optim.gradient import PartOfGradient, TensorGradient
from fp8train.optim.offload_plan import element_bytes, loads, pieces, slot_sizes, unit_of_rows
from fp8train.precision.state_formats import StateFormat
from tests.optim.fused_cases import gradient_of, in_blocks
from tests.optim.late_queues import LateQueues, Race

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda() -> Any:
    made = MagicMock()
    made.Stream.side_effect = [made.inward, made.outward]
    made.stream.side_effect = lambda stream: nullcontext()
    names = ("Stream", "Event", "stream", "current_stream")
    with patch.multiple(torch.cuda, **{name: getattr(made, name) for name in names}):
        yield made


def test_a_load_in_and_out_waits_on_the_device_alone(cuda: Any) -> None:
    queues = CudaCopies(DEVICE)
    host, slot = MagicMock(), MagicMock()
    cuda.attach_mock(host, "host")
    cuda.attach_mock(slot, "slot")
    cuda.reset_mock()
    queues.wait("in", cuda.free)
    queues.copy("in", [slot], [host])
    queues.wait("compute", queues.mark("in"))
    queues.wait("out", queues.mark("compute"))
    queues.copy("out", [host], [slot])
    current = cuda.current_stream.return_value
    assert cuda.mock_calls == [
        call.inward.wait_event(cuda.free),
        call.stream(cuda.inward),
        call.slot.copy_(host, non_blocking=True),
        call.Event(),
        call.Event().record(cuda.inward),
        call.current_stream(DEVICE),
        call.current_stream().wait_event(cuda.Event.return_value),
        call.Event(),
        call.current_stream(DEVICE),
        call.Event().record(current),
        call.outward.wait_event(cuda.Event.return_value),
        call.stream(cuda.outward),
        call.host.copy_(slot, non_blocking=True),
    ]
    cuda.reset_mock()
    queues.settle()
    assert cuda.mock_calls == [call.inward.synchronize(), call.outward.synchronize()]


def test_host_memory_is_page_locked(cuda: Any) -> None:
    with patch("torch.empty") as empty:
        assert CudaCopies(DEVICE).host_memory(1000) is empty.return_value
    empty.assert_called_once_with(1000, dtype=torch.uint8, pin_memory=True)


def test_devices_have_their_queues(cuda: Any) -> None:
    assert isinstance(copy_queues(DEVICE), CudaCopies)
    assert all(isinstance(copy_queues(torch.device(name)), CopiesAtOnce) for name in ("cpu", "meta"))


def test_late_copies_are_late() -> None:
    """The tests' own tool: nothing moves before it is waited for, in the order of the queues."""
    queues = LateQueues()
    host, slot = queues.host_memory(4), queues.device_memory(4)
    host.fill_(1)
    queues.copy("in", [slot], [host])
    assert slot.tolist() == [255] * 4
    queues.wait("compute", queues.mark("in"))
    assert slot.tolist() == [1] * 4
    slot.fill_(2)
    queues.wait("out", queues.mark("compute"))
    queues.copy("out", [host], [slot])
    assert host.tolist() == [1] * 4
    with pytest.raises(Race, match="in uses memory that out may be using still"):
        queues.copy("in", [slot], [host])
    queues.settle()
    assert host.tolist() == [2] * 4 and slot.tolist() == [255] * 4


def test_loads_are_runs_of_parameters_that_fit() -> None:
    sizes = {"embedding": 90.0, "norm": 1.0, "qkv": 30.0, "out": 19.0, "up": 51.0, "down": 49.0, "head": 90.0}
    assert loads(sizes, 50) == [("embedding",), ("norm", "qkv", "out"), ("up",), ("down",), ("head",)]
    assert loads({}, 50) == []
    # Slots are taken in turn: 0 has loads of 9, 1 and 3.
    assert slot_sizes([9, 5, 2, 1, 6, 2, 3]) == [9, 6, 2] and slot_sizes([4]) == [4, 0, 0]


def test_pieces_cover_all_rows_in_whole_units() -> None:
    assert pieces(10, 1000, 250, 1) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert pieces(10, 1000, 700, 4) == [(0, 4), (4, 8), (8, 10)]
    assert pieces(3, 1000, 1, 2) == [(0, 2), (2, 3)]  # no piece is smaller than a unit
    assert unit_of_rows(4096, [128, 1]) == 1
    assert unit_of_rows(40, [40, 1]) == 8  # 320 elements: five vectors of 64
    assert unit_of_rows(33, [32, 1]) == 64  # whole rows, as a block is short
    assert [
        element_bytes(StateFormat(name)) for name in ("fp32", "bf16_remainder", "fp16_scaled", "e5m2")
    ] == [
        4,
        4,
        2,
        1,
    ]


@pytest.mark.parametrize("shape", [(6, 128), (6, 200), (6, 257)])
@pytest.mark.parametrize("form", [in_blocks, lambda g: TensorGradient(g.bfloat16())], ids=["FP8", "BF16"])
def test_rows_of_a_gradient_are_found_behind_others(shape: tuple[int, int], form: Any) -> None:
    gradient, width = gradient_of(shape, 1), shape[1]
    whole, part = form(gradient), form(gradient[2:].contiguous())
    found = PartOfGradient(form(gradient), 2 * width)
    assert torch.equal(found.chunk(0, 3 * width), whole.chunk(2 * width, 5 * width))
    ours, theirs = found.stored(3 * width), part.stored(3 * width)
    assert ours is not None and theirs is not None
    assert torch.equal(ours.values.float(), theirs.values.float())
    assert (ours.scales is None) == (theirs.scales is None)
    if ours.scales is not None and theirs.scales is not None:
        assert torch.equal(ours.scales, theirs.scales)
