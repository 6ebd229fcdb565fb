"""Stop requests: which signals ask, how ranks agree, what a second Ctrl-C does."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8train.run_dir.claim import RunDirGoneError
from fp8train.training.signals import SAME_CTRL_C_S, Stop, StopRequest
from tests.distributed.pool import GlooPool


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """SIGHUP as in a terminal: under nohup it is ignored, and then we ignore it too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
STATES = {
    "SIGTERM": "preempted", "SIGUSR1": "preempted", "SIGUSR2": "preempted", "SIGHUP": "stopped",
    "SIGINT": "stopped",
}  # fmt: skip


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_once_however_often_it_comes(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopRequest(None) as stop:
        assert stop.agree(None) is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun and Slurm both forward it
        assert [stop.agree(None)] * 3 == [Stop(STATES[number.name], number.name)] * 3
        assert stop.agree(None) == stop.agree(None)
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_handlers_are_restored_when_the_run_raises() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest(None):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("content", "state", "reason"),
    [
        (b"", "stopped", "STOP file"),
        (b"preempted", "preempted", "STOP file"),
        (b"preempted: Slurm time limit\nmore\n", "preempted", "STOP file (Slurm time limit)"),
        (b"lunch \xff\x1b[2J", "stopped", "STOP file (lunch \ufffd?[2J)"),
    ],
)
def test_the_stop_file_asks(tmp_path: Path, content: bytes, state: str, reason: str) -> None:
    with StopRequest(tmp_path / "STOP") as stop:
        assert stop.agree(None) is None
        (tmp_path / "STOP").write_bytes(content)
        assert stop.agree(None) == Stop(state, reason)  # type: ignore[arg-type]


def test_whatever_is_called_stop_asks(tmp_path: Path) -> None:
    def folder(path: Path) -> None:
        path.mkdir()

    def pipe(path: Path) -> None:
        os.mkfifo(path)  # reading it would wait for a writer

    def dangling(path: Path) -> None:
        path.symlink_to("nowhere")

    for number, make in enumerate((folder, pipe, dangling)):
        path = tmp_path / str(number)
        make(path)
        with StopRequest(path) as stop:
            assert stop.agree(None) == Stop("stopped", "STOP file")
    (tmp_path / "file").touch()
    with StopRequest(tmp_path / "file" / "STOP") as stop:
        assert stop.agree(None) is None


def test_a_run_directory_that_is_gone_ends_the_run() -> None:
    with StopRequest(None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.gone = lambda: "run directory x was deleted"
        with pytest.raises(RunDirGoneError, match="run directory x was deleted"):
            stop.agree(None)


def test_a_second_interrupt_raises_only_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("fp8train.training.signals.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(StopRequest, "_force", lambda stop, patience_s: None)  # would end this process
    answers: queue.Queue[str] = queue.Queue()

    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)

    def wait_after(number: signal.Signals) -> None:
        send(number)
        time.sleep(60)

    with StopRequest(None) as stop:
        stop.say = answers.put
        send(signal.SIGINT)
        assert answers.get(timeout=60) == (
            "Ctrl-C: stopping before the first step; Ctrl-C once more: quit now"
        )
        clock[0] += SAME_CTRL_C_S * 0.9
        stop.plan = "saving"
        send(signal.SIGINT)
        send(signal.SIGTERM)  # answered after what came before it was looked at
        assert answers.get(timeout=60) == "SIGTERM: saving"
        assert not stop.quitting
        clock[0] += SAME_CTRL_C_S * 0.2
        with pytest.raises(KeyboardInterrupt):
            wait_after(signal.SIGINT)
        assert stop.quitting
        assert answers.get(timeout=60) == "quitting now"
        send(signal.SIGINT)  # nothing more to raise
        assert stop.agree(None) == Stop("stopped", "SIGINT")


def test_a_run_started_with_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agree(None) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def asked(group, rank, world_size, folder, wishes):
    """Three agreements; before the second, each rank gets what ``wishes`` says."""
    answers = []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where the tests run under nohup
    with StopRequest(Path(folder) / "STOP") as stop:
        answers.append(stop.agree(group))
        wish = wishes.get(rank)
        if wish == "STOP":
            (Path(folder) / "STOP").touch()
        elif wish is not None:
            os.kill(os.getpid(), getattr(signal, wish))
        answers.append(stop.agree(group))
        answers.append(stop.agree(group))
    return answers


@pytest.mark.parametrize(
    ("wishes", "stop"),
    [
        ({}, None),
        ({0: "STOP"}, Stop("stopped", "STOP file")),
        ({2: "SIGUSR1"}, Stop("preempted", "SIGUSR1")),
        ({1: "SIGTERM", 2: "SIGUSR2"}, Stop("preempted", "SIGTERM")),
        ({0: "SIGHUP", 1: "SIGTERM"}, Stop("stopped", "SIGHUP")),  # a person wins over a machine
        ({0: "SIGINT", 1: "SIGINT", 2: "SIGTERM"}, Stop("stopped", "SIGINT")),
    ],
)
def test_all_ranks_stop_together(
    gloo_pool: GlooPool, tmp_path: Path, wishes: dict[int, str], stop: Stop | None
) -> None:
    assert gloo_pool.run(asked, 3, str(tmp_path), wishes) == [[None, stop, stop]] * 3


STUCK = """
import sys, time
from fp8train.training import signals
signals._UNWIND_S, signals.SAME_CTRL_C_S = 0.5, 0.2
with signals.StopRequest(None) as stop:
    if "over" in sys.argv:
        stop.settle(3, lambda: print("on record", flush=True))
    print("ready", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            if "swallow" not in sys.argv:
                raise
"""


@pytest.mark.parametrize("behaviour", ["unwind", "swallow", "over"])
def test_a_second_ctrl_c_ends_the_process_even_if_python_does_not(behaviour: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, behaviour], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None  # the first is a request
        process.send_signal(signal.SIGINT)
        status = process.wait(20)
    finally:
        process.kill()
    # An uncaught KeyboardInterrupt ends Python by SIGINT; the command line turns it into 130. Once the end of
    # a run is on record, the status on record is the status.
    assert status == {"unwind": -signal.SIGINT, "swallow": 130, "over": 3}[behaviour]
