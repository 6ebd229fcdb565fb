"""Injected faults are what they say, strike when they say, once, and are refused where they could not.

What a run makes of them is in tests/faults.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from fp8train.checkpoint.save import SavePhase
from fp8train.cli import run_command
from fp8train.comm.progress import PHASES
from fp8train.config.debug_schema import FaultConfig, FaultKind, FaultPhase
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import resolve_mapping
from fp8train.config.world import check_world
from fp8train.training.strikes import InjectedFaultError, bend, fill_disk, flip_bit, strike_process
from tests.config.examples import minimal
from tests.training.launching import write_config

pytestmark = pytest.mark.usefixtures("one_thread")


def fault(kind: str, **settings: object) -> FaultConfig:
    return FaultConfig.model_validate({"kind": kind, "step": 1, **settings})


def test_phases_are_those_of_steps_and_saves() -> None:
    """The schema cannot import either. Before ``build`` there is no run directory to leave word in."""
    moments = [f"save_{moment}" for moment in get_args(SavePhase)]
    assert list(get_args(FaultPhase)) == [*PHASES[1:], *moments]


ENDS = {
    "exit": 7,
    "sigterm": -signal.SIGTERM,
    "sigint": -signal.SIGINT,
    "sigkill": -signal.SIGKILL,
    "segfault": -signal.SIGSEGV,
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_process_ends_as_it_would_without_injection(kind: str) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGSEGV):
                signal.signal(number, signal.SIG_DFL)  # no traceback of pytest's faulthandler
            strike_process(fault(kind, **({"status": 7} if kind == "exit" else {})))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ENDS[kind]


def test_a_stopped_process_is_stopped() -> None:
    pid = os.fork()
    if pid == 0:
        strike_process(fault("sigstop"))
        os._exit(3)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


def test_sleeping_with_the_interpreter_s_lock_lets_no_thread_run() -> None:
    import threading

    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.005)

    thread = threading.Thread(target=tick)
    thread.start()
    gaps = {}
    for kind in ("gil", "sleep"):
        began = time.monotonic()
        strike_process(fault(kind, seconds=0.6))
        ended = time.monotonic()
        assert ended - began >= 0.6
        gaps[kind] = sum(began + 0.05 < at < ended - 0.05 for at in ticks)
    done.set(), thread.join()
    assert gaps["gil"] == 0
    assert gaps["sleep"] > 0


def test_exceptions_and_memory_are_torch_s_own() -> None:
    with pytest.raises(InjectedFaultError, match="exception at rank 0, step 1, forward"):
        strike_process(fault("exception"))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        strike_process(fault("oom_host"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_full_until_it_ends(small_disk: Path) -> None:
    end = fill_disk(small_disk)
    assert shutil.disk_usage(small_disk).free == 0
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "file").write_text("x" * 5000)
    end()
    (small_disk / "file").write_text("x" * 5000)


def test_a_large_disk_is_not_filled(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 2 << 30:
        pytest.skip("the disk of temporary files is nearly full")
    with pytest.raises(ConfigError, match=r"put run\.dir on a small one"):
        fill_disk(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_one_bit_is_flipped(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 13, dtype=torch.float32).view(3, 4).to(dtype)
    before = tensor.view(torch.uint8).numpy().reshape(-1).copy()
    width = tensor.element_size()
    flip_bit(fault("bit_flip_weight", name="w", element=5, bit=8 * width - 1), tensor)
    assert float(tensor.float().view(-1)[5]) == -6.0  # the highest bit is the sign
    changed = np.nonzero(tensor.view(torch.uint8).numpy().reshape(-1) != before)[0]
    assert list(changed) == [5 * width + width - 1]
    for wrong in ({"element": 12}, {"bit": 8 * width}):
        with pytest.raises(ConfigError, match=rf"is {next(iter(wrong.values()))}, but there are"):
            flip_bit(fault("bit_flip_weight", name="w", **wrong), tensor)


def test_a_module_is_bent_until_it_ends() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False))
    x = torch.randn(5, 3)
    plain = model[0](x).detach()

    def gradient(one: FaultConfig) -> torch.Tensor:
        """Of the loss in what module 0 puts out, from the gradient of its bias."""
        end = bend(one, model)
        model.zero_grad()
        model(x).sum().backward()
        end()
        assert model[0].bias.grad is not None
        return model[0].bias.grad

    end = bend(fault("outlier_channel", name="0", channel=2, factor=50.0), model)
    seen = model[0](x).detach()
    end()
    assert torch.equal(seen, plain * torch.tensor([1.0, 1.0, 50.0, 1.0]))
    assert torch.equal(model[0](x).detach(), plain)
    assert gradient(fault("nan_gradient", name="0")).isnan().all()
    true = 5 * model[1].weight.detach()[0]
    torch.testing.assert_close(gradient(fault("bit_flip_gradient", name="1")), true, rtol=1e-6, atol=0)
    # The sign of element [1, 0] of the gradient of module 0's output: twice its value is missing in the sum.
    flipped = gradient(fault("bit_flip_gradient", name="0", element=4, bit=31))
    torch.testing.assert_close(flipped, true - 2 * torch.tensor([1.0, 0, 0, 0]) * true / 5)
    end = bend(fault("nan_gradient", name="1"), model)
    with pytest.raises(ConfigError, match="1 did not run as a module of its own"):
        end()
    with pytest.raises(ConfigError, match=r"this rank has no module layers\.9; it has, for example, 0, 1"):
        bend(fault("nan_gradient", name="layers.9"), model)


REFUSED = [
    ("{kind: sigkil, step: 1}", "did you mean sigkill"),
    ("{kind: sigkill}", "step"),
    ("{kind: sigkill, step: 1, phase: saving}", "phase"),
    ("{kind: sigkill, step: 0}", "phase: forward is one of a step; the first is 1"),
    ("{kind: sigkill, step: 1, phase: build}", "phase: build comes before the first step; write step: 0"),
    ("{kind: sigkill, step: 99}", "is for step 99, but the run ends with step"),
    ("{kind: sleep, step: 1}", "kind: sleep needs seconds; add it"),
    ("{kind: sigkill, step: 1, seconds: 2.0}", "seconds is of kind sleep, gil or slow, but kind is sigkill"),
    ("{kind: nan_gradient, step: 1}", "kind: nan_gradient needs name; add it"),
    ("{kind: nan_loss, step: 1, phase: reduce}", "lies in a forward pass, but phase is reduce"),
    ("{kind: bit_flip_weight, step: 0, phase: build, name: w}", "needs a model"),
    ("{kind: sigkill, step: 1, rank: 1, phase: save_rename}", "is of rank 0 alone, but rank is 1"),
    ("{kind: sigkill, step: 1, rank: some}", "rank"),
    ("{kind: sigkill, step: 1, phase: evaluate}", "train.eval_interval is 0"),
]


@pytest.mark.parametrize(("text", "told"), REFUSED)
def test_a_fault_that_means_nothing_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_mapping(minimal(), [f"debug.fault_injection=[{text}]", "train.eval_interval=0"])
    assert "debug.fault_injection" in str(caught.value)
    assert told in str(caught.value)


def test_modules_are_not_bent_where_they_are_compiled() -> None:
    bent = "debug.fault_injection=[{kind: nan_loss, step: 1}]"
    with pytest.raises(ConfigError, match=r"train\.compile fixes what runs; write train\.compile: off"):
        resolve_mapping(minimal(), [bent, "train.compile=block"])


def test_a_rank_that_there_is_not_is_refused() -> None:
    config = resolve_mapping(minimal(), ["debug.fault_injection=[{kind: exit, step: 1, rank: 1}]"]).config
    with pytest.raises(ConfigError, match="exit is for rank 1, but of 1 process the last is rank 0"):
        check_world(config, 1)
    check_world(config, 2)


def train(folder: Path, *faults: str, overrides: tuple[str, ...] = ()) -> tuple[int, Path]:
    words = ["train", str(folder / "run.yaml"), f"run.dir={folder}", "train.steps=6", "train.eval_interval=0"]
    words += ["checkpoint.interval=2", "checkpoint.resume=auto", "logging.cast_statistics_interval=0"]
    return run_command([*words, f"debug.fault_injection=[{', '.join(faults)}]", *overrides]), folder / "run"


def rows(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_run_tells_of_its_faults_and_is_hit_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path)
    faults = (
        "{kind: nan_loss, step: 3}",
        "{kind: slow, step: 4, steps: 2, seconds: 0.2, phase: data}",
        "{kind: sleep, step: 3, seconds: 0.01, phase: save_begin}",  # nothing is saved in step 3
        "{kind: exception, step: 5, phase: optimizer}",
    )
    with pytest.raises(InjectedFaultError, match="exception at rank 0, step 5, optimizer"):
        train(tmp_path, *faults)
    run = tmp_path / "run"
    struck = [(row["step"], row["fault"]) for row in rows(run, "events.jsonl") if row["kind"] == "fault"]
    assert struck == [(3, "nan_loss"), (4, "slow"), (5, "exception")]
    said = capsys.readouterr().err
    assert said.count("FAULT INJECTION is on") == 4
    assert said.count("INJECTED FAULT: ") == 3
    losses = {row["step"]: row["train/loss"] for row in rows(run, "metrics.jsonl")}
    assert [math.isnan(float(losses[step])) for step in (1, 2, 3, 4)] == [False, False, True, False]

    status, run = train(tmp_path, *faults)
    assert status == 0
    said = capsys.readouterr().err
    assert "INJECTED FAULT" not in said
    assert said.count("FAULT INJECTION is on") == 4
    assert "injected fault that never struck: sleep at rank 0, step 3, save_begin" in said
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    assert len(list((run / "faults").iterdir())) == 3

    # A name that there is not is refused when there is a model.
    wrong = train(tmp_path, "{kind: bit_flip_weight, step: 6, name: head}", overrides=("run.name=other",))
    assert wrong[0] == 2
    assert "this rank has no tensor head; it has, for example, master/" in capsys.readouterr().err


def test_kinds_have_a_test_each() -> None:
    known = {*ENDS, "sigstop", "gil", "sleep", "slow", "exception", "oom_host", "disk_full", "nan_loss"}
    known |= {"bit_flip_weight", "bit_flip_gradient", "outlier_channel", "nan_gradient", "hang"}
    assert known == set(get_args(FaultKind))
