"""``run.deterministic`` where it takes effect: a model that is built, by whatever command or by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fp8train
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.models.build import build_model
from fp8train.step.trainer import Trainer
from fp8train.training.run import prepare_machine
from tests.training.tiny import VOCAB, tiny_config

CPU = torch.device("cpu")
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "")  # remembered, so that it is put back
    monkeypatch.delenv(VARIABLE)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("entrance", ["build_model", "Trainer", "prepare_machine"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_every_entrance_sets_what_cuda_needs(entrance: str, deterministic: bool) -> None:
    threads = torch.get_num_threads()
    config = tiny_config([f"run.deterministic={str(deterministic).lower()}", f"run.threads={threads}"])
    if entrance == "build_model":
        build_model(config, vocab_size=VOCAB, device=CPU)
    elif entrance == "Trainer":
        Trainer(config, Processes(CPU, 1, 0, CountedGroup(None), None), vocab_size=VOCAB)
    else:
        prepare_machine(config, 1)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get(VARIABLE) == (":4096:8" if deterministic else None)


def test_a_workspace_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    build_model(tiny_config(["run.deterministic=true"]), vocab_size=VOCAB, device=CPU)
    assert os.environ[VARIABLE] == ":16:8"


def test_one_place_asks_torch_for_it() -> None:
    package = Path(fp8train.__file__).parent
    callers = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "torch.use_deterministic_algorithms(" in path.read_text()
    ]
    assert callers == ["kernels/deterministic.py"]
