"""The launch scripts on a real Slurm: two pretended nodes with two ranks each train, stop, return, finish.

Run with ``launch/test.sh -m slurm``. The minutes that a requeued job waits are skipped by setting its start
time to now; everything else is what a cluster does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.one_box import OneBoxCluster, missing_programs
from tests.training.launching import STEPS, finish, history, start, weights, write_config

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"needs slurm-wlm and munge ({', '.join(missing_programs())} not found)",
    ),
]
ROOT = Path(__file__).parents[2]
SBATCH, CHAIN = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "slurm_chain.sh"
ENVIRONMENT = {"FP8TRAIN_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SIZE = ("--nodes=2", "--gpus-per-node=2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneBoxCluster]:
    with OneBoxCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(config: Path) -> tuple[list, str]:
    """Records and weights of a run that was never stopped."""
    finish(start(config, 4, "run.name=whole"))
    return list(history(config.parent / "whole")), weights(config.parent / "whole")


class Job:
    """A submitted job with its log and run directory."""

    def __init__(self, cluster: OneBoxCluster, folder: Path, number: str, run: Path, log: Path) -> None:
        self.cluster, self.folder, self.number = cluster, folder, number
        self.run, self.log_file = run, log

    @classmethod
    def submit(cls, cluster: OneBoxCluster, config: Path, name: str, *overrides: str, flags: str) -> Job:
        """With ``sbatch launch/slurm.sbatch``."""
        folder = config.parent
        run = (f"run.dir={folder}", f"run.name={name}", *overrides)
        command = ("sbatch", "--parsable", *SIZE, *flags.split(), str(SBATCH), str(config), *run)
        number = cluster.call(*command, cwd=folder, **ENVIRONMENT).strip()
        return cls(cluster, folder, number, folder / name, folder / f"fp8train-{number}.log")

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def until(self, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.cluster.job(self.number)}\n{self.log}"
            time.sleep(0.1)

    def until_ended(self) -> str:
        self.until(lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.state

    def until_step(self, step: int) -> None:
        """Wait for a logged step, and fail at once when the job ends before."""

        def reached() -> bool:
            assert self.state in ("PENDING", "RUNNING"), self.log
            metrics = self.run / "metrics.jsonl"
            return metrics.exists() and len(metrics.read_text().splitlines()) >= step

        self.until(reached)

    def until_requeued(self) -> None:
        job: dict[str, str] = {}

        def requeued() -> bool:
            job.update(self.cluster.job(self.number))
            return job["JobState"] == "PENDING" and job["Restarts"] != "0"

        self.until(requeued)

    def start_again_now(self) -> None:
        """Without the minutes that a requeued job waits."""
        self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())


def test_a_job_stops_before_its_limit_returns_and_finishes(
    cluster: OneBoxCluster, config: Path, whole: tuple[list, str]
) -> None:
    """The records and weights of two turns are those of a run that was never stopped."""
    job = Job.submit(cluster, config, "turns", flags="--time=10")
    job.until_step(5)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)  # what --signal=B:USR1@... does
    job.until_requeued()
    stopped = job.status()
    assert (stopped["state"], stopped["exit_code"]) == ("preempted", 0)
    assert stopped["reason"] == "STOP file (Slurm time limit)"
    assert 5 <= stopped["step"] < STEPS

    job.start_again_now()
    assert job.until_ended() == "COMPLETED", job.log
    assert "turn 1: 2 x 2 processes" in job.log
    assert "turn 2: 2 x 2 processes" in job.log
    assert job.log.count("4 x CPU") == 2
    assert f"at step {stopped['step']}" in job.log.split("turn 2")[1]
    assert job.log.endswith("state of the run: completed\n")
    assert not (job.run / "STOP").exists()

    assert (list(history(job.run)), weights(job.run)) == whole


def test_the_time_limit_itself_gives_the_signal(cluster: OneBoxCluster, config: Path) -> None:
    """Slurm looks at limits every half minute, and may give the signal up to a minute early."""
    endless = ("train.steps=1000000", "checkpoint.interval=0", "train.eval_interval=0")
    job = Job.submit(cluster, config, "limit", *endless, flags="--time=2 --signal=B:USR1@100")
    job.until_requeued()
    assert job.log.count("USR1: asking the run to save and end") == 1
    assert job.status()["state"] == "preempted"
    assert (job.run / "checkpoints" / f"step_{job.status()['step']:08d}").is_dir()
    cluster.call("scancel", job.number)


def test_a_killed_rank_fails_the_job_and_is_not_requeued(cluster: OneBoxCluster, config: Path) -> None:
    job = Job.submit(cluster, config, "killed", "train.steps=1000000", flags="--time=10")
    job.until_step(3)
    holder = json.loads((job.run / "run.lock").read_text())
    os.kill(holder["pid"], signal.SIGKILL)
    assert job.until_ended() == "FAILED"
    assert "srun ended with status" in job.log
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_wrong_configuration_fails_with_2_before_any_rank_starts(
    cluster: OneBoxCluster, config: Path
) -> None:
    job = Job.submit(cluster, config, "typo", "optimizer.lerning_rate=1", flags="--time=10")
    assert job.until_ended() == "FAILED"
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert "lerning_rate" in job.log
    assert not job.run.exists()


def test_a_cancelled_job_is_preempted_and_stays_away(cluster: OneBoxCluster, config: Path) -> None:
    job = Job.submit(cluster, config, "cancelled", "train.steps=1000000", flags="--time=10")
    job.until_step(3)
    cluster.call("scancel", job.number)
    assert job.until_ended() == "CANCELLED"
    assert cluster.job(job.number)["Restarts"] == "0"
    record = job.status()
    assert record["state"] == "preempted", job.log
    assert "SIGTERM" in record["reason"]
    assert (job.run / "checkpoints" / f"step_{record['step']:08d}").is_dir()


def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint(
    cluster: OneBoxCluster, config: Path, whole: tuple[list, str]
) -> None:
    """Slurm requeues the job by itself, and the next turn continues from the newest checkpoint."""
    job = Job.submit(cluster, config, "node", flags="--time=10")
    job.until_step(6)
    cluster.call("scontrol", "update", f"NodeName={cluster.nodes[1]}", "State=DOWN", "Reason=test")
    job.until_requeued()
    with suppress(subprocess.CalledProcessError):  # its daemon may have brought it back
        cluster.call("scontrol", "update", f"NodeName={cluster.nodes[1]}", "State=RESUME")
    job.start_again_now()
    assert job.until_ended() == "COMPLETED", job.log
    assert "turn 2: 2 x 2 processes" in job.log
    assert (list(history(job.run)), weights(job.run)) == whole


@pytest.mark.parametrize("mode", ["array", "singleton"])
def test_a_chain_continues_and_ends_itself(
    cluster: OneBoxCluster, config: Path, whole: tuple[list, str], mode: str
) -> None:
    """Four turns at most; the first is told to save, the second finishes, the others never start."""
    folder, name = config.parent, f"chain_{mode}"
    words = (f"--turns=4 --mode={mode} --name={name} --time=10").split()
    run = (f"run.dir={folder}", f"run.name={name}")
    said = cluster.call(str(CHAIN), *words, *SIZE, str(config), *run, cwd=folder, **ENVIRONMENT)
    numbers = [line.split()[1] for line in said.splitlines()]
    assert len(numbers) == (1 if mode == "array" else 4)
    listed = ("squeue", "--noheader", "--array", f"--name={name}", "--format=%i %T")

    def turns() -> list[list[str]]:
        """``[number, state]`` of the turns that are not over."""
        return [line.split() for line in cluster.call(*listed).splitlines()]

    def running() -> list[str]:
        return [number for number, state in turns() if state == "RUNNING"]

    def log_of(number: str) -> Path:
        return folder / f"{name}-{cluster.job(number)['JobId']}.log"

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            logs = [path.read_text() for path in folder.glob(f"{name}-*.log")]
            assert time.monotonic() < deadline, (turns(), logs)
            time.sleep(0.1)

    until(lambda: len(running()) == 1)
    (first,) = running()
    job = Job(cluster, folder, first, folder / name, log_of(first))
    job.until_step(5)
    (job.run / "STOP").write_text("preempted: test\n")  # what the signal leads to
    until(lambda: bool(running()) and running() != [first])
    assert job.status()["state"] != "completed"
    until(lambda: not turns())
    assert (list(history(folder / name)), weights(folder / name)) == whole
    logs = sorted(folder.glob(f"{name}-*.log"))
    assert len(logs) == 2, [log.read_text() for log in logs]
    first_log, second_log = (
        (log.read_text() for log in logs)
        if logs[0] == job.log_file
        else (log.read_text() for log in reversed(logs))
    )
    assert "state of the run: preempted" in first_log
    assert "back into the queue" not in first_log
    assert "turn 2: 2 x 2 processes" in second_log
    assert "the chain ends here: the run is completed" in second_log


def test_launch_slurm_submits_what_it_checked(
    cluster: OneBoxCluster, config: Path, whole: tuple[list, str]
) -> None:
    folder = config.parent
    command = (sys.executable, "-m", "fp8train", "launch", "slurm", str(config), *SIZE, "--time=10")
    run = (f"run.dir={folder}", "run.name=launched")
    said = cluster.call(*command, "--", *run, cwd=folder, **ENVIRONMENT)
    number = said.split()[2].rstrip(";")
    log = folder / "launched/launch/001" / f"launched-{number}.log"
    job = Job(cluster, folder, number, folder / "launched", log)
    assert job.until_ended() == "COMPLETED", job.log
    assert (list(history(job.run)), weights(job.run)) == whole
