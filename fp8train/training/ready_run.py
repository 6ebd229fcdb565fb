"""A run that is ready to train, as one thing for the functions around the loop."""

from __future__ import annotations

from dataclasses import dataclass

from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.data.loading import Data
from fp8train.live.reporter import Reporter
from fp8train.run_dir.directory import RunDir
from fp8train.step.base_trainer import BaseTrainer


@dataclass(frozen=True)
class ReadyRun:
    """What one process's run consists of. Whoever puts it together makes these, and ends them."""

    run_dir: RunDir
    """Where it writes."""
    data: Data
    """What it reads."""
    trainer: BaseTrainer
    """What it trains."""
    reporter: Reporter
    """What it tells, and to whom."""

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.trainer.config

    @property
    def processes(self) -> Processes:
        """This process's place in the job."""
        return self.trainer.processes
