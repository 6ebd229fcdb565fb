"""A run in the hands of a person: its first words, the live line, Ctrl-C once and twice, a closed terminal.

Every wait is for a text or for the end of a process.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8train.cli.train_command import LAUNCHER, continue_command
from fp8train.config.resolve import load_config
from tests.training.launching import start, write_config

LONG = ("train.steps=1000000", "train.eval_interval=0", "checkpoint.interval=0", "logging.interval=1000000")
PATIENCE_S = 100.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs that end only when they are told to."""
    return write_config(tmp_path_factory.mktemp("terminal"))


def status_of(config: Path, name: str) -> tuple[str, int]:
    status = json.loads((config.parent / name / "status.json").read_text())
    return status["state"], status["exit_code"]


class Output:
    """What comes out of a file descriptor, as it comes."""

    def __init__(self, fd: int) -> None:
        self.fd, self.text, self._seen = fd, "", 0

    def wait_for(self, pattern: str, meanwhile: Callable[[], None] = lambda: None) -> str:
        """The first match after the one before; ``meanwhile`` is done about ten times a second."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = re.compile(pattern).search(self.text, self._seen)
            if found:
                self._seen = found.end()
                return found.group()
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            meanwhile()
            assert self._read(0.1), f"ended without {pattern!r}:\n{self.text}"

    def read_to_the_end(self) -> str:
        while self._read(PATIENCE_S):
            pass
        return self.text

    def _read(self, timeout: float) -> bool:
        """Whether there may be more."""
        if not select.select([self.fd], [], [], timeout)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # a pseudo-terminal that nobody holds any more
            return False
        self.text += data.decode(errors="replace")
        return bool(data)


def in_a_terminal(config: Path, *overrides: str) -> tuple[int, int]:
    """Start a run on a pseudo-terminal that is its controlling one; the process and our side of it."""
    pid, fd = pty.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGHUP):  # the tests may run in the background, or under nohup
            signal.signal(number, signal.SIG_DFL)
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fp8train", "train", str(config), f"run.dir={config.parent}"]
        os.execve(sys.executable, [*command, *overrides], environment)
    return pid, fd


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_terminal_shows_the_start_the_progress_and_how_to_go_on(config: Path) -> None:
    pid, fd = in_a_terminal(config, *LONG, "run.name=watched", "run.overwrite=true")
    output = Output(fd)
    output.wait_for(rf"^starting {re.escape(str(config))}: llama at O0, 1000000 steps, 1 process; ")
    for _ in range(2):
        output.wait_for(
            r"\nstep +\d+/1000000 \| loss \d\.\d{4} \| [\d.]+k? tok/s \| ETA \S+?\x1b\[A\r+\x1b\[J"
        )
    os.write(fd, b"\x03")
    output.wait_for(
        r"\x1b\[JCtrl-C: saving to .*/watched/checkpoints after this step; "
        r"Ctrl-C once more: quit now\r\n"
    )
    output.wait_for(r"stopped at step \d+: SIGINT\r\n")
    last = output.wait_for(r"continue with: .*\r\n").strip().removeprefix("continue with: ")
    assert output.read_to_the_end().endswith(f"{last}\r\n")
    os.close(fd)
    assert exit_status(pid) == 0
    assert status_of(config, "watched") == ("stopped", 0)
    assert shlex.split(last) == [
        "python", "-m", "fp8train", "train", str(config), f"run.dir={config.parent}", *LONG,
        "run.name=watched", "checkpoint.resume=auto",
    ]  # fmt: skip


def test_a_terminal_that_is_closed_saves_the_run(config: Path) -> None:
    pid, fd = in_a_terminal(config, *LONG, "run.name=closed")
    Output(fd).wait_for(r"tok/s \| ETA")
    os.close(fd)  # SIGHUP, and nothing can be printed any more
    assert exit_status(pid) == 0
    assert status_of(config, "closed") == ("stopped", 0)
    assert json.loads((config.parent / "closed/status.json").read_text())["reason"] == "SIGHUP"


def piped(process: subprocess.Popen) -> Output:
    assert process.stdout is not None
    return Output(process.stdout.fileno())


def test_a_stop_during_the_start_is_honoured_before_the_first_step(config: Path) -> None:
    processes = start(config, 2, *LONG, "run.name=early")
    outputs = [piped(process) for process in processes]
    outputs[0].wait_for(r"^starting .* 2 processes")
    processes[0].send_signal(signal.SIGTERM)
    outputs[0].wait_for("SIGTERM: stopping before the first step\n")
    outputs[0].wait_for("preempted before training began: SIGTERM\n")
    assert outputs[1].read_to_the_end() == ""
    text = outputs[0].read_to_the_end()
    assert [process.wait() for process in processes] == [0, 0]
    assert status_of(config, "early") == ("preempted", 0)
    assert not list((config.parent / "early/checkpoints").iterdir())
    assert text.splitlines()[-1].startswith("continue with: torchrun --standalone --nproc-per-node=2 -m ")
    assert "\x1b" not in text
    assert "\r" not in text


def press_ctrl_c(process: subprocess.Popen) -> Callable[[], None]:
    return lambda: process.send_signal(signal.SIGINT)


def test_a_second_ctrl_c_during_the_start(config: Path) -> None:
    [process] = start(config, 1, *LONG, "run.name=impatient")
    output = piped(process)
    output.wait_for("^starting ")
    process.send_signal(signal.SIGINT)
    output.wait_for("Ctrl-C once more: quit now\n")
    output.wait_for("quitting now\n", press_ctrl_c(process))
    output.read_to_the_end()
    assert process.wait() == 130


def test_a_second_ctrl_c_while_waiting_for_another_rank(config: Path) -> None:
    processes = start(config, 2, *LONG, "run.name=alone")
    output = piped(processes[0])
    output.wait_for(r"\nstep +1/")
    try:
        processes[1].send_signal(signal.SIGSTOP)  # rank 0 is soon in a collective that nobody joins
        processes[0].send_signal(signal.SIGINT)
        output.wait_for("after this step; Ctrl-C once more: quit now\n")
        output.wait_for("quitting now\n", press_ctrl_c(processes[0]))
        output.read_to_the_end()
        assert processes[0].wait() == 130
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert status_of(config, "alone") == ("interrupted", 130)
    assert json.loads((config.parent / "alone/status.json").read_text())["step"] >= 1


@pytest.mark.parametrize(
    ("environment", "overrides", "words"),
    [
        ({}, ["checkpoint.resume=never", "a=b c"], "python -m fp8train train CONFIG 'a=b c' AUTO"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["run.overwrite=true"],
         "torchrun --standalone --nproc-per-node=2 -m fp8train train CONFIG AUTO"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, [],
         "the command that started it, with checkpoint.resume=auto"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", LAUNCHER: "NPROC=2 ./torchrun.sh"},
         ["checkpoint.resume=auto", "run.name=x"], "NPROC=2 ./torchrun.sh CONFIG run.name=x"),
    ],
)  # fmt: skip
def test_how_to_continue(
    config: Path,
    environment: dict[str, str],
    overrides: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["/some/where/fp8train/__main__.py"])
    expected = words.replace("CONFIG", str(config)).replace("AUTO", "checkpoint.resume=auto")
    assert continue_command(config, overrides, load_config(config)) == expected


def test_a_file_that_overwrites_is_told_not_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("run: {", "run: {overwrite: true, "))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fp8train"])
    monkeypatch.setattr("fp8train.cli.train_command.shutil.which", lambda name: f"/usr/bin/{name}")
    command = continue_command(config, [], load_config(config))
    assert command == f"fp8train train {config} run.overwrite=false checkpoint.resume=auto"
    again = load_config(config, shlex.split(command)[3:]).config
    assert (again.run.overwrite, again.checkpoint.resume) == (False, "auto")


@pytest.mark.parametrize("elsewhere", [None, "/usr/bin/fp8train"])
def test_a_program_that_the_shell_does_not_find_is_named_by_its_path(
    elsewhere: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkout whose environment is not activated."""
    config = write_config(tmp_path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/fp8train"])
    monkeypatch.setattr("fp8train.cli.train_command.shutil.which", lambda name: elsewhere)
    assert continue_command(config, [], load_config(config)).startswith(".venv/bin/fp8train train ")
