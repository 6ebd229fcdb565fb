"""Where a step looks at values on the device, which makes the host wait: once, before the optimizer.

On CPUs nothing waits, but the same calls are made. What CPUs alone look at is left out.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

import fp8train
from fp8train.comm.processes import Processes, joined_processes
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches, tiny_config

LOOKS = ("__bool__", "__float__", "__int__", "item", "tolist", "cpu", "nonzero", "tensor")
"""Of values; ``torch.tensor`` with values copies them to the device and waits too."""
ON_CPUS_ONLY = ("decode.py", "stochastic.py")
OPTIMIZER = "optimizer"
_PACKAGE = str(Path(fp8train.__file__).parent)
REDUCTIONS = {
    "exchange": (),
    "shared_scale": ("precision.gradient.fp8.reduce=shared_scale",),
    "exact": ("precision.gradient.fp8.reduce=exact",),
}


class _Looks(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in LOOKS:
            frames = traceback.extract_stack()
            file = next(Path(f.filename).name for f in reversed(frames) if f.filename.startswith(_PACKAGE))
            if file not in ON_CPUS_ONLY:
                self.found.append(f"{file}: {name}")
        return func(*args, **(kwargs or {}))


def looks(processes: Processes, *overrides: str) -> list[str]:
    """Of the second step, in order, with the optimizer among them."""
    config = tiny_config(["precision.level=O3", "run.threads=1", *overrides])
    trainer, data = Trainer(config, processes, vocab_size=VOCAB), batches(config, processes)
    trainer.step(0, data.batch(0))
    mode, update = _Looks(), trainer.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        mode.found.append(OPTIMIZER)
        update(*args, **kwargs)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    with mode:
        assert trainer.step(1, data.batch(1)).applied
    return mode.found


def looks_on_a_rank(group: dist.ProcessGroup, rank: int, world_size: int, *overrides: str) -> list[str]:
    """Runs in the pool."""
    return looks(joined_processes(torch.device("cpu")), *overrides)


def expected(reduction: str) -> list[str]:
    fits = ["grids.py: __bool__"] if reduction == "exact" else []
    return [*fits, "measured.py: tolist", OPTIMIZER]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_step_waits_before_the_optimizer_only(reduction: str) -> None:
    assert looks(alone(), *REDUCTIONS[reduction]) == expected(reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_neither_does_it_with_owners(gloo_pool, reduction: str) -> None:
    for found in gloo_pool.run(looks_on_a_rank, 2, *REDUCTIONS[reduction]):
        assert found == expected(reduction)
