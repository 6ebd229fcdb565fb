"""When a verdict is reached, by watchdogs of several ranks over one folder and a clock that the test sets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fp8train.comm.calls import Calls, GroupCalls
from fp8train.comm.failures import FOLDER_VARIABLE, recorded
from fp8train.comm.progress import Progress
from fp8train.config.watchdog_schema import WatchdogConfig
from fp8train.run_dir.directory import RunDir
from fp8train.run_dir.failed import read_failure
from fp8train.watch import watchdog as module
from fp8train.watch.heartbeat import RECORD_BYTES, read
from fp8train.watch.last_words import HUNG, LastWords
from fp8train.watch.process import Identity, kill, own_identity, state_of
from fp8train.watch.verdict import Verdict
from fp8train.watch.watchdog import Found, Watchdog

SETTINGS = WatchdogConfig(step_timeout_s=60, save_timeout_s=200, startup_timeout_s=500, stopped_timeout_s=20)


class Ranks:
    """Ranks whose main threads and clocks are the test's; a rank in ``silent`` does not tick."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.now, self.silent = 1000.0, set[int]()
        self.progress = [Progress() for _ in range(count)]
        self.groups: list[GroupCalls] = []
        self.dogs = []
        for rank in range(count):
            calls = Calls()
            self.groups.append(calls.group("dp", range(count)))
            self.dogs.append(
                Watchdog(
                    SETTINGS, folder, self.progress[rank], calls, rank=rank, world_size=count,
                    several_machines=False, end=lambda found, publish: None, clock=lambda: self.now,
                )
            )  # fmt: skip
        for step in (0, 1):  # the first one is start-up
            for progress in self.progress:
                progress.enter("data", step=step)

    def pass_time(self, seconds: int) -> dict[int, tuple[float, Found]]:
        """Tick every second; when who found what first."""
        found: dict[int, tuple[float, Found]] = {}
        for _ in range(seconds):
            self.now += 1.0
            for rank, dog in enumerate(self.dogs):
                if rank not in self.silent and (seen := dog.tick()) is not None:
                    found.setdefault(rank, (self.now - 1000.0, seen))
        return found


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_a_rank_that_hangs_outside_collectives_is_found_by_all_when_the_time_is_over(ranks: Ranks) -> None:
    for rank in (0, 2):
        ranks.progress[rank].enter("reduce")
        ranks.groups[rank].begun("all_reduce/gradient", lambda: None)
    found = ranks.pass_time(70)
    assert {rank: at for rank, (at, _) in found.items()} == pytest.approx({0: 61, 1: 61, 2: 61}, abs=1.01)
    for _, one in found.values():
        assert (one.verdict.kind, one.verdict.guilty) == ("behind", (1,))
        assert "step 2, phase data" in one.verdict.message


def test_one_rank_that_moves_is_enough(ranks: Ranks) -> None:
    for _ in range(10):
        assert not ranks.pass_time(59)
        ranks.progress[2].beat()


def test_a_slow_save_has_a_time_of_its_own(ranks: Ranks) -> None:
    ranks.progress[0].enter("save")
    found = ranks.pass_time(210)
    assert min(at for at, _ in found.values()) == pytest.approx(201, abs=1.01)


def test_a_rank_without_a_sign_of_life_is_found_whichever_it_is(tmp_path: Path) -> None:
    for silent in (0, 2):
        folder = tmp_path / str(silent)
        folder.mkdir()
        ranks = Ranks(folder)
        ranks.pass_time(2)
        ranks.silent.add(silent)
        found = ranks.pass_time(70)
        assert {one.verdict.guilty for _, one in found.values()} == {(silent,)}
        assert {one.verdict.kind for _, one in found.values()} == {"stopped"}
        assert len(found) == 2


def test_a_rank_that_is_seen_to_be_stopped_is_found_sooner(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.pass_time(1)
    ranks.silent.add(1)
    monkeypatch.setattr(module, "state_of", lambda process: "stopped")  # all are this process
    found = ranks.pass_time(30)
    assert min(at for at, _ in found.values()) == pytest.approx(21, abs=1.01)
    assert {one.verdict.guilty for _, one in found.values()} == {(1,)}
    assert "stopped (its process does not run)" in found[0][1].verdict.message


def test_a_job_that_was_suspended_is_measured_anew(ranks: Ranks) -> None:
    assert not ranks.pass_time(50)
    ranks.now += 10_000.0
    assert not ranks.pass_time(55)
    assert ranks.pass_time(10)


def test_a_verdict_of_another_rank_is_taken_over(ranks: Ranks) -> None:
    ranks.pass_time(30)
    verdict = Verdict("behind", (2,), "rank 2 it is")
    assert ranks.dogs[0]._publish(verdict)
    assert not ranks.dogs[1]._publish(Verdict("inside", (), "nobody"))
    found = ranks.dogs[1].tick()
    assert found is not None
    assert found.verdict == verdict
    assert not found.own


def test_a_record_has_a_fixed_size_and_is_whole(ranks: Ranks, tmp_path: Path) -> None:
    with ranks.groups[0].held("all_reduce/gradient"):
        ranks.pass_time(1)
    ranks.progress[0].enter("report")
    ranks.pass_time(1)
    assert (tmp_path / "rank0").stat().st_size == RECORD_BYTES
    beat = read(tmp_path, 0)
    assert beat is not None
    assert (beat.phase, beat.step, beat.groups[0].entered, beat.groups[0].left) == ("report", 1, 1, 1)
    assert beat.process == own_identity()
    (tmp_path / "rank0").write_bytes(b'{"alive": 3')
    assert read(tmp_path, 0) is None


def test_a_thread_writes_and_a_run_that_ends_says_so(tmp_path: Path) -> None:
    settings = WatchdogConfig(interval_s=0.01)
    progress, calls = Progress(), Calls()
    ended: list[Any] = []
    with Watchdog(
        settings, tmp_path, progress, calls, rank=0, world_size=1, several_machines=False,
        end=lambda *found: ended.append(found),
    ):  # fmt: skip
        deadline = time.monotonic() + 30
        while (read(tmp_path, 0) or pytest.fail("no heartbeat")).alive < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    last = read(tmp_path, 0)
    assert last is not None
    assert last.phase == "ended"
    assert not ended


def test_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank leaves behind, for the launcher, in status.json and on the screen."""
    monkeypatch.setenv("RANK", "0")
    run = RunDir.open(tmp_path, "r", resume="never", overwrite=False, group=None)
    (tmp_path / "told").mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "told"))
    said: list[str] = []
    left: list[int] = []
    settings, settled = WatchdogConfig(interval_s=0.01), list[int]()
    words = LastWords(
        settings, run, lambda: 41, lambda: settled[0] if settled else None, said.append, left.append
    )
    published: list[bool] = []
    found = Found(Verdict("behind", (2,), "rank 2 (host X, pid Y) has not moved for 61 s"), True, {})
    words(found, lambda: not published.append(True))
    assert left == [HUNG] == [5]
    assert published == [True]
    assert said == []  # the launcher speaks
    (told,) = recorded(tmp_path / "told")
    assert (told.exit_status, told.peers_lost) == (5, False)
    assert told.message.startswith("rank 2 (host X, pid Y) has not moved for 61 s\n")
    status = json.loads((run.path / "status.json").read_text())
    expected = {"state": "failed", "exit_code": 5, "rank": 2, "step": 41}
    assert {name: status[name] for name in expected} == expected
    assert status["reason"] == "rank 2 (host X, pid Y) has not moved for 61 s"
    assert read_failure(run.path) is not None
    stacks = (run.path / "logs" / "stacks_rank0.txt").read_text()
    assert "test_last_words" in stacks
    monkeypatch.delenv(FOLDER_VARIABLE)
    words(found, lambda: True)
    assert said[0].startswith("error: rank 2 (host X, pid Y) has not moved for 61 s\n")
    words(found, lambda: False)  # another rank was first, and speaks
    assert len(said) == 1
    settled.append(0)
    words(found, lambda: True)
    assert left == [5, 5, 5, 0]  # the run was over, and hung only in leaving
    assert len(said) == 1


def test_processes_are_told_apart_stopped_and_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ours = own_identity()
        process = Identity(ours.host, child.pid, ours.place, int(fields[19]))
        assert state_of(process) == "runs"
        assert state_of(Identity(ours.host, child.pid, "another boot", process.started)) is None
        other = Identity(ours.host, child.pid, ours.place, process.started + 1)
        assert state_of(other) == "gone"  # somebody else has its number
        kill(other)
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while state_of(process) != "stopped":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kill(process)
        assert child.wait(30) == -signal.SIGKILL
        assert state_of(process) == "gone"
    finally:
        child.kill()


def test_a_limit_below_four_heartbeats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"watchdog.step_timeout_s: 3 is less than four heartbeats"):
        WatchdogConfig(step_timeout_s=3)
