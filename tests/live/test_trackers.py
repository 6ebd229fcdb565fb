"""Trackers: curves arrive, and nothing that goes wrong in them reaches the run."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fp8train.config.all_sections import LoggingConfig, WandbConfig
from fp8train.live.trackers import TensorBoardTracker, Trackers
from fp8train.live.wandb_tracker import WandbTracker, kept_run_id
from fp8train.run_dir.directory import RunDir


class FakeWandb(types.ModuleType):
    """Stands in for the library; ``trouble`` is called with the name of every call."""

    def __init__(self, trouble: Any = lambda call: None) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.threads: set[int] = set()
        self.trouble = trouble
        self.key = True

    def record(self, call: str, detail: Any) -> None:
        self.threads.add(threading.get_ident())
        self.trouble(call)
        self.calls.append((call, detail))

    def login(self, *, prompt: bool) -> bool:
        self.record("login", prompt)
        return self.key

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> "FakeWandb":
        self.record("init", arguments)
        return self

    def define_metric(self, name: str, **settings: Any) -> None:
        self.record("define_metric", (name, settings))

    def log(self, record: dict[str, Any]) -> None:
        self.record("log", record)

    def finish(self, *, exit_code: int) -> None:
        self.record("finish", exit_code)

    def of(self, call: str) -> list[Any]:
        return [detail for name, detail in self.calls if name == call]


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def install(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)


def tracker(path: Path, mode: str = "online", **settings: Any) -> WandbTracker:
    return WandbTracker(
        WandbConfig(mode=mode, project="p", entity="team"),  # type: ignore[arg-type]
        directory=path,
        run_id="id1",
        run_name="name",
        run_config={"a": 1},
        **settings,
    )


def finished(wandb_tracker: WandbTracker) -> str | None:
    wandb_tracker.close("completed")
    return wandb_tracker.take_problem()


def test_records_arrive_in_order_from_another_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    install(monkeypatch, fake)
    t = tracker(tmp_path)
    for step in range(5):
        t.log(step, step * 10, {"train/loss": 1.0 / (step + 1)})
    assert finished(t) is None
    assert fake.of("log") == [{"step": s, "tokens": 10 * s, "train/loss": 1.0 / (s + 1)} for s in range(5)]
    assert fake.of("login") == [False]  # never ask at the terminal
    (init,) = fake.of("init")
    assert {k: init[k] for k in ("id", "name", "config", "project", "entity", "mode", "resume", "dir")} == {
        "id": "id1",
        "name": "name",
        "config": {"a": 1},
        "project": "p",
        "entity": "team",
        "mode": "online",
        "resume": "allow",
        "dir": str(tmp_path),
    }
    assert fake.of("finish") == [0]
    defined = dict(fake.of("define_metric"))
    assert defined["*"] == {"step_metric": "step"}
    assert defined["time/step_max_s"] == {"step_metric": "step", "summary": "max,last"}
    assert threading.get_ident() not in fake.threads


def test_a_failed_run_is_marked_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    install(monkeypatch, fake)
    t = tracker(tmp_path)
    t.close("failed")
    assert fake.of("finish") == [1]


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, None)  # import raises ModuleNotFoundError
    t = tracker(tmp_path)
    t.log(1, 1, {"train/loss": 1.0})
    problem = finished(t)
    assert problem is not None
    assert "ModuleNotFoundError" in problem
    assert t.take_problem() is None  # once


def test_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    fake.key = False
    install(monkeypatch, fake)
    problem = finished(tracker(tmp_path))
    assert problem is not None
    assert "wandb login" in problem
    assert fake.of("init") == []


@pytest.mark.parametrize("call", ["login", "init", "define_metric", "log", "finish"])
def test_any_call_may_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    class CommError(Exception):
        pass

    def trouble(name: str) -> None:
        if name == call:
            raise CommError("cannot reach api.wandb.ai\nwith details")

    fake = FakeWandb(trouble)
    install(monkeypatch, fake)
    t = tracker(tmp_path)
    for step in range(3):
        t.log(step, step, {"train/loss": 1.0})
    problem = finished(t)
    assert problem == "CommError: cannot reach api.wandb.ai"
    t.log(9, 9, {"train/loss": 1.0})  # ignored
    assert t.take_problem() is None


@pytest.mark.parametrize("call", ["login", "init", "log", "finish"])
def test_any_call_may_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    release = threading.Event()
    fake = FakeWandb(lambda name: release.wait(60) if name == call else None)
    install(monkeypatch, fake)
    t = tracker(tmp_path, queue_records=10, close_timeout_s=0.2)
    before = time.perf_counter()
    for step in range(2000):
        t.log(step, step, {"train/loss": 1.0})
    # Generous: what is excluded is waiting for the library, which hangs for a minute.
    assert time.perf_counter() - before < 5.0
    problem = finished(t)
    release.set()
    assert problem is not None
    assert "did not finish within 0.2 s" in problem
    if call != "finish":
        assert "records were dropped" in problem


def test_the_newest_records_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = threading.Event()
    fake = FakeWandb(lambda name: release.wait(60) if name == "init" else None)
    install(monkeypatch, fake)
    t = tracker(tmp_path, queue_records=3)
    for step in range(10):
        t.log(step, step, {})
    release.set()
    assert finished(t) == "7 records were dropped because it was too slow"
    assert [record["step"] for record in fake.of("log")] == [7, 8, 9]


def test_the_environment_may_take_a_run_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    fake.key = False
    install(monkeypatch, fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert finished(tracker(tmp_path, "online")) is None
    assert fake.of("init")[0]["mode"] == "offline"
    assert fake.of("login") == []


def test_the_run_id_stays(tmp_path: Path) -> None:
    first = kept_run_id(tmp_path)
    assert kept_run_id(tmp_path) == first
    assert len(first) >= 8
    other = tmp_path / "other"
    other.mkdir()
    assert kept_run_id(other) != first


def open_run(tmp_path: Path, resume: str = "never") -> RunDir:
    return RunDir.open(tmp_path, "run", resume=resume, overwrite=False, group=None)


def events(run: RunDir) -> list[dict[str, Any]]:
    path = run.path / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def all_trackers(run: RunDir, *, mode: str = "offline") -> Trackers:
    logging = LoggingConfig(tensorboard=True, wandb=WandbConfig(mode=mode))  # type: ignore[arg-type]
    return Trackers(logging, run, run.log_event, run_name="run", run_config={"b": 2})


def test_both_trackers_and_a_resumed_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids = []
    for resume in ("never", "auto"):
        fake = FakeWandb()
        install(monkeypatch, fake)
        run = open_run(tmp_path, resume)
        trackers = all_trackers(run)
        first = 1 if resume == "never" else 3
        for step in range(first, first + 4):  # the first attempt reached 4; the second resumes after 2
            trackers.log(step, 100 * step, {"train/loss": float(step if resume == "never" else -step)})
        trackers.close("completed")
        ids.append(fake.of("init")[0]["id"])
        assert len(fake.of("log")) == 4
        assert events(run) == []
        run.close()
    assert ids[0] == ids[1]
    read = EventAccumulator(str(run.tensorboard)).Reload()
    points = [(e.step, e.value) for e in read.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, -3.0), (4, -4.0), (5, -5.0), (6, -6.0)]
    by_tokens = [(e.step, e.value) for e in read.Scalars("train/loss_by_tokens")]
    assert by_tokens[-1] == (600, -6.0)


def test_a_tracker_that_fails_is_reported_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def trouble(name: str) -> None:
        if name == "log":
            raise ConnectionError("gone")

    install(monkeypatch, FakeWandb(trouble))
    run = open_run(tmp_path)
    trackers = all_trackers(run)
    for step in range(1, 4):
        trackers.log(step, step, {"train/loss": 1.0})
    trackers.close("completed")
    (event,) = events(run)
    assert (event["kind"], event["tracker"], event["problem"]) == (
        "tracker_failed",
        "wandb",
        "ConnectionError: gone",
    )
    assert len(EventAccumulator(str(run.tensorboard)).Reload().Scalars("train/loss")) == 3
    run.close()


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    trackers = all_trackers(replace(run, rank=1), mode="online")
    trackers.log(1, 1, {"train/loss": 1.0})
    trackers.close("completed")
    assert not [p for folder in ("tb", "wandb") for p in (run.path / folder).glob("*")]
    run.close()


def test_tensorboard_without_its_directory(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file is in the way")
    t = TensorBoardTracker(tmp_path / "tb")
    t.log(1, 1, {"train/loss": 1.0})
    problem = t.take_problem()
    assert problem is not None
    assert "tb" in problem
    t.log(2, 2, {"train/loss": 1.0})
    t.close("completed")
    assert t.take_problem() is None


REAL = """
import sys
from pathlib import Path
from fp8train.config.all_sections import WandbConfig
from fp8train.live.wandb_tracker import WandbTracker
mode, directory, close_timeout = sys.argv[1:]
t = WandbTracker(
    WandbConfig(mode=mode), directory=Path(directory), run_id="kept1", run_name="n", run_config={"lr": 0.1},
    init_timeout_s=2.0, close_timeout_s=float(close_timeout),
)
for step in range(3):
    t.log(step, 10 * step, {"train/loss": 1.0 / (step + 1)})
t.close("completed")
print(t.take_problem())
"""


def run_real(tmp_path: Path, mode: str, close_timeout: float, **environment: str) -> str:
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "run").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(home), "NETRC": str(home / "netrc"), **environment}
    code = subprocess.run(
        [sys.executable, "-c", REAL, mode, str(tmp_path / "run"), str(close_timeout)],
        env=env,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert code.returncode == 0, code.stderr
    return code.stdout.strip()


def test_the_real_library_offline(tmp_path: Path) -> None:
    assert run_real(tmp_path, "offline", 60.0) == "None"
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*-kept1/run-kept1.wandb")
    assert kept.stat().st_size > 0


def test_the_real_library_without_a_key(tmp_path: Path) -> None:
    assert "API key" in run_real(tmp_path, "online", 60.0)


@pytest.mark.parametrize("listening", [False, True])
def test_the_real_library_with_a_host_that_does_not_answer(tmp_path: Path, listening: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:  # accepts, and says nothing
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        said = run_real(tmp_path, "online", 2.0, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=address)
    assert "did not finish" in said or "Error" in said
