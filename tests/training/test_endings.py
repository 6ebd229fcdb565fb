"""However a run ends, status.json and the exit status say the same, and what was saved stays saved.

One process, one run for each case; runs of several ranks end in test_kill.py and test_launch_mistakes.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fp8train.checkpoint.catalog import candidates
from fp8train.cli import main, run_command
from fp8train.live.reporter import Reporter
from fp8train.live.trackers import TensorBoardTracker
from fp8train.run_dir import failed
from fp8train.run_dir.directory import RunDir
from fp8train.step.non_finite import DivergedError
from fp8train.training import time_limit
from fp8train.training.loop import TrainingLoop
from fp8train.training.signals import StopRequest
from tests.training.launching import write_config

STEPS = 4
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("endings"))


class Moment:
    """Calls something in the middle of step 2, and at other places of the program."""

    def __init__(self, patch: pytest.MonkeyPatch, run: Path) -> None:
        self.patch, self.run = patch, run

    def in_step_2(self, act: Callable[[], object]) -> None:
        one_step = TrainingLoop._one_step

        def step(loop: TrainingLoop, number: int, *args: Any, **more: Any) -> Any:
            if number == 1:
                act()
            return one_step(loop, number, *args, **more)

        self.patch.setattr(TrainingLoop, "_one_step", step)

    def at_the_end(self, act: Callable[[], object]) -> None:
        """When the last status is on record."""
        end = Reporter.end

        def ended(*args: Any) -> None:
            act()
            end(*args)

        self.patch.setattr(Reporter, "end", ended)

    def raising(self, error: BaseException) -> Callable[[], object]:
        def act() -> None:
            raise error

        return act

    def no_room(self, *names: str) -> None:
        for name in names:
            self.patch.setattr(failed, name, lambda path, *args: self.raising(OSError(errno.ENOSPC, "x"))())


def kill(number: signal.Signals) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


def full(moment: Moment) -> None:
    moment.in_step_2(lambda: moment.no_room("replace_file"))


def preempting_stop(moment: Moment) -> None:
    moment.in_step_2(lambda: (moment.run / "STOP").write_text("preempted: Slurm time limit\n"))


def out_of_time(moment: Moment) -> None:
    moment.in_step_2(lambda: moment.patch.setattr(time_limit, "_RESERVE", 1e9))


def late(moment: Moment) -> None:
    moment.patch.setattr(time_limit, "process_age_s", lambda: 3600.0)


def bad_close(moment: Moment) -> None:
    moment.patch.setattr(TensorBoardTracker, "close", lambda *args: moment.raising(ValueError("odd"))())


def second_ctrl_c(moment: Moment) -> None:
    """Both come in step 2, a second apart; the main thread is in the middle of something."""

    def twice() -> None:
        kill(signal.SIGINT)()
        time.sleep(1.2)
        kill(signal.SIGINT)()
        time.sleep(60)

    moment.in_step_2(twice)
    moment.patch.setattr(StopRequest, "_force", lambda stop, patience_s: None)  # would end this process


@dataclass(frozen=True)
class Ending:
    """What happens, and how the run ends: state, exit status, steps done, a part of the reason."""

    happens: Callable[[Moment], None]
    state: str
    status: int
    step: int
    reason: str
    overrides: tuple[str, ...] = ()


def in_step(act: Callable[[], object]) -> Callable[[Moment], None]:
    return lambda moment: moment.in_step_2(act)


def raised(error: BaseException) -> Callable[[Moment], None]:
    return lambda moment: moment.in_step_2(moment.raising(error))


def at_end(act: Callable[[], object]) -> Callable[[Moment], None]:
    return lambda moment: moment.at_the_end(act)


DONE = "all steps done"
LIMIT = ("run.time_limit_minutes=30",)
TENSORBOARD = ("logging.tensorboard=true",)
ENDINGS = {
    "completed": Ending(lambda moment: None, "completed", 0, STEPS, DONE),
    "sigterm": Ending(in_step(kill(signal.SIGTERM)), "preempted", 0, 2, "SIGTERM"),
    "sighup": Ending(in_step(kill(signal.SIGHUP)), "stopped", 0, 2, "SIGHUP"),
    "stop": Ending(preempting_stop, "preempted", 0, 2, "STOP file (Slurm time limit)"),
    "time": Ending(out_of_time, "preempted", 0, 2, "time limit", LIMIT),
    "no_time": Ending(late, "failed", 2, 0, "was over before the first step", LIMIT),
    "second_ctrl_c": Ending(second_ctrl_c, "interrupted", 130, 1, "second Ctrl-C"),
    "bug": Ending(raised(KeyError("layers")), "failed", 1, 1, "KeyError: 'layers'"),
    "memory": Ending(raised(MemoryError("bad")), "failed", 2, 1, "rank 0 ran out of CPU memory in step 2"),
    "non_finite": Ending(raised(DivergedError("NaN")), "failed", 3, 1, "NaN"),
    "full_disk": Ending(full, "completed", 0, STEPS, DONE),
    "full_disk_stopped": Ending(
        lambda moment: (moment.no_room("replace_file"), moment.in_step_2(kill(signal.SIGINT)))[0],
        "stopped", 0, 2, "SIGINT",
    ),
    "full_disk_failed": Ending(
        lambda moment: (moment.no_room("replace_file"), moment.in_step_2(moment.raising(KeyError("x"))))[0],
        "failed", 1, 1, "KeyError: 'x'",
    ),
    # Once the last status is on record, nothing changes it.
    "sigterm_at_end": Ending(at_end(kill(signal.SIGTERM)), "completed", 0, STEPS, DONE),
    "error_at_end": Ending(
        lambda moment: moment.at_the_end(moment.raising(RuntimeError("odd"))), "completed", 0, STEPS, DONE
    ),
    "tracker_at_end": Ending(bad_close, "completed", 0, STEPS, DONE, TENSORBOARD),
}  # fmt: skip


def train(config: Path, name: str, *overrides: str) -> int:
    words = ["train", str(config), f"run.dir={config.parent}", f"run.name={name}", f"train.steps={STEPS}"]
    words += ["train.eval_interval=0", "checkpoint.interval=0", "checkpoint.resume=auto", *overrides]
    return run_command(words)


@pytest.mark.parametrize("name", ENDINGS)
def test_status_and_exit_status_agree(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    ending, directory = ENDINGS[name], config.parent / name
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with monkeypatch.context() as patch:
            ending.happens(Moment(patch, directory))
            status = train(config, name, *ending.overrides)
    except Exception as error:  # a bug keeps its traceback, and Python ends with 1
        print(repr(error))
        status = 1
    finally:
        signal.signal(signal.SIGHUP, before)
    told = json.loads((directory / "status.json").read_text())
    assert (told["state"], told["exit_code"], told["step"]) == (ending.state, ending.status, ending.step)
    assert ending.reason in told["reason"]
    assert status == ending.status
    assert not (directory / "STOP").exists()
    saved = [path.name for path in candidates(directory / "checkpoints")]
    assert saved == ([f"step_{ending.step:08d}"] if status == 0 else [])
    if status == 0 and ending.state != "completed":
        assert f"{ending.state} at step 2: {ending.reason}" in capsys.readouterr().out


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_directory_that_is_taken_away_ends_the_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], replaced: bool
) -> None:
    directory = config.parent / f"taken{replaced}"
    others = []

    def take_away() -> None:
        shutil.rmtree(directory)
        if replaced:
            others.append(
                RunDir.open(config.parent, directory.name, resume="auto", overwrite=False, group=None)
            )

    Moment(monkeypatch, directory).in_step_2(take_away)
    assert train(config, directory.name) == 2
    said = capsys.readouterr().err
    assert f"run directory {directory} was {'replaced' if replaced else 'deleted'}" in said
    assert "Traceback" not in said
    if replaced:  # another job's status is its own
        assert json.loads((directory / "status.json").read_text())["state"] == "running"
        assert candidates(directory / "checkpoints") == []
        others[0].close()


def test_a_failure_while_groups_are_left_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8train.comm import processes

    def destroy() -> None:
        raise RuntimeError("NCCL says no")

    monkeypatch.setattr(processes.dist, "destroy_process_group", destroy)
    processes._leave_groups()


def test_an_output_without_room_does_not_change_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself would end with 120: it flushes once more, and fails."""
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    kept = os.dup(1)
    try:
        with open("/dev/full", "w") as stream:
            os.dup2(stream.fileno(), 1)
            monkeypatch.setattr("sys.stdout", os.fdopen(os.dup(1), "w"))
            monkeypatch.setattr("sys.argv", ["fp8train", "--version"])
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == 0
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        for number, handler in before:
            signal.signal(number, handler)
