"""The step's temporaries are a few chunks, whatever the model's size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8train.numerics.block_scales import dequantize_blocks, quantize_blocks
from fp8train.optim.optimizer import CHUNK
from fp8train.precision.number_formats import E4M3
from fp8train.precision.state_formats import StateFormat as F
from fp8train.precision.state_formats import StateFormats
from fp8train.update_rules.adamw import AdamW
from tests.optim.state_cases import O1, O2, PAPER, single

SR = "stochastic"
EVERYTHING = StateFormats(
    F("fp16_scaled", rounding=SR), F("e4m3", expand=True, rounding=SR), F("e4m3", expand=True, rounding=SR)
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate while it is active, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs | self._seen:
                self._watch(tensor.untyped_storage())
        return outputs

    def _watch(self, storage: torch.UntypedStorage) -> None:
        handle, size = storage._cdata, storage.nbytes()
        self._seen.add(handle)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.live -= size
            self._seen.discard(handle)

        weakref.finalize(storage, freed)


class BlockGradient:
    """An FP8 gradient, decoded a chunk at a time."""

    def __init__(self, gradient: Tensor) -> None:
        self._payload, self._scales = quantize_blocks(gradient.view(-1, 128), E4M3)

    def chunk(self, start: int, stop: int) -> Tensor:
        blocks = slice(start // 128, stop // 128)
        return dequantize_blocks(self._payload[blocks], self._scales[blocks]).view(-1)


def peak_of_a_step(plan: StateFormats, num_elements: int) -> int:
    shape = (num_elements // 1024, 1024)
    optimizer, _ = single(AdamW, plan, 0.02 * torch.randn(shape))
    reader = BlockGradient(torch.randn(shape))
    one = torch.tensor(1.0)
    with LiveBytes() as tracker:
        optimizer.step(lambda _: reader, step=1, lr_factor=1.0, grad_multiplier=one)
    assert tracker.live < 100  # nothing but scalars survives
    return tracker.peak


def test_the_tracker_counts() -> None:
    def measure(run: Callable[[], object]) -> int:
        with LiveBytes() as tracker:
            run()
        return tracker.peak

    x = torch.ones(1000)
    assert measure(lambda: x + 1) == 4000
    assert measure(lambda: (x + 1) * 2 + x) == 8000
    assert measure(lambda: x.mul_(2)) == 0
    assert measure(lambda: x[:10].view(2, 5)) == 0
    assert measure(lambda: [x + i for i in range(3)]) == 12000


# Peak in chunks of FP32 as measured, and the most allowed.
@pytest.mark.parametrize(
    ("plan", "chunks"),
    [(StateFormats(), 3), (O1, 8), (O2, 8), (PAPER, 8), (EVERYTHING, 12)],
    ids=["fp32", "O1", "O2", "paper", "everything at once"],
)
def test_temporaries_are_a_few_chunks(plan: StateFormats, chunks: int) -> None:
    peak = peak_of_a_step(plan, 2 * CHUNK)
    print(f"{plan}: peak {peak / CHUNK / 4:.2f} chunks")
    assert peak <= chunks * 4 * CHUNK
    states = single(AdamW, plan, torch.zeros(8, 1024))[0].states
    stored = sum(states.stored_bytes(in_plan_only=True).values()) / 8192
    assert peak <= 0.10 * stored * 64e6  # a step of 64M parameters peaks at most 10 % above what is stored


def test_temporaries_do_not_grow_with_the_model() -> None:
    assert peak_of_a_step(O2, 2 * CHUNK) == peak_of_a_step(O2, 4 * CHUNK)
