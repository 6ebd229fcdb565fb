"""launch/slurm.sbatch on a real Slurm: two pretended nodes with two ranks each train, stop, return, finish.

Run with ``launch/test.sh -m slurm``. The minutes that a requeued job waits are skipped by setting its start
time to now; everything else is what a cluster does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
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
SBATCH = Path(__file__).parents[2] / "launch" / "slurm.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneBoxCluster]:
    with OneBoxCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("runs"))


class Job:
    """A submitted job with its log and run directory."""

    def __init__(self, cluster: OneBoxCluster, config: Path, name: str, *overrides: str, flags: str) -> None:
        self.cluster, self.folder, self.run = cluster, config.parent, config.parent / name
        size = ("--nodes=2", "--gpus-per-node=2")
        run = (f"run.dir={config.parent}", f"run.name={name}", *overrides)
        command = ("sbatch", "--parsable", *size, *flags.split(), str(SBATCH), str(config), *run)
        environment = {"FP8TRAIN_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        self.number = cluster.call(*command, cwd=self.folder, **environment).strip()

    @property
    def log(self) -> str:
        path = self.folder / f"fp8train-{self.number}.log"
        return path.read_text() if path.exists() else ""

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

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())


def test_a_job_stops_before_its_limit_returns_and_finishes(cluster: OneBoxCluster, config: Path) -> None:
    """The records and weights of two turns are those of a run that was never stopped."""
    job = Job(cluster, config, "turns", flags="--time=10")
    job.until_step(5)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)  # what --signal=B:USR1@... does
    job.until_requeued()
    stopped = job.status()
    assert (stopped["state"], stopped["reason"], stopped["exit_code"]) == ("stopped", "STOP file", 0)
    assert 5 <= stopped["step"] < STEPS

    cluster.call("scontrol", "update", f"JobId={job.number}", "StartTime=now")
    assert job.until_ended() == "COMPLETED", job.log
    assert "turn 1: 2 x 2 processes" in job.log
    assert "turn 2: 2 x 2 processes" in job.log
    assert job.log.count("4 x CPU") == 2
    assert f"at step {stopped['step']}" in job.log.split("turn 2")[1]
    assert job.log.endswith("state of the run: completed\n")
    assert not (job.run / "STOP").exists()

    finish(start(config, 4, "run.name=whole"))
    assert history(job.run) == history(config.parent / "whole")
    assert weights(job.run) == weights(config.parent / "whole")


def test_the_time_limit_itself_gives_the_signal(cluster: OneBoxCluster, config: Path) -> None:
    """Slurm looks at limits every half minute, and may give the signal up to a minute early."""
    endless = ("train.steps=1000000", "checkpoint.interval=0", "train.eval_interval=0")
    job = Job(cluster, config, "limit", *endless, flags="--time=2 --signal=B:USR1@100")
    job.until_requeued()
    assert job.log.count("USR1: asking the run to save and end") == 1
    assert job.status()["state"] == "stopped"
    assert (job.run / "checkpoints" / f"step_{job.status()['step']:08d}").is_dir()
    cluster.call("scancel", job.number)


def test_a_killed_rank_fails_the_job_and_is_not_requeued(cluster: OneBoxCluster, config: Path) -> None:
    job = Job(cluster, config, "killed", "train.steps=1000000", flags="--time=10")
    job.until_step(3)
    holder = json.loads((job.run / "run.lock").read_text())
    os.kill(holder["pid"], signal.SIGKILL)
    assert job.until_ended() == "FAILED"
    assert "srun ended with status" in job.log
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_wrong_configuration_fails_with_2_before_any_rank_starts(
    cluster: OneBoxCluster, config: Path
) -> None:
    job = Job(cluster, config, "typo", "optimizer.lerning_rate=1", flags="--time=10")
    assert job.until_ended() == "FAILED"
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert "lerning_rate" in job.log
    assert not job.run.exists()
