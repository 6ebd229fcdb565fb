"""When a run saves, and what: the side of checkpoints that the training loop sees.

A checkpoint is the trainer's tensors, this rank's random states and a description (configuration, place in
the data, host state) that is enough to continue or to use the model without the command that trained it.
"""

from __future__ import annotations

import time
from typing import Any

from fp8train import __version__
from fp8train.checkpoint import capture_rng, save_checkpoint
from fp8train.comm.processes import Processes
from fp8train.config.schema import Config, to_plain
from fp8train.data.loading import Data
from fp8train.training.reporter import Reporter
from fp8train.training.run_dir import RunDir
from fp8train.training.trainer import Trainer


class Saving:
    """Saves the checkpoints of a run.

    Attributes:
        saved_at: the step of the newest checkpoint, saved or resumed from; None without one.
    """

    def __init__(
        self,
        config: Config,
        *,
        processes: Processes,
        run_dir: RunDir,
        data: Data,
        trainer: Trainer,
        reporter: Reporter,
    ) -> None:
        self.config, self.processes, self.run_dir = config, processes, run_dir
        self.data, self.trainer, self.reporter = data, trainer, reporter
        self.saved_at: int | None = None

    def due(self, done: int, *, stopping: bool) -> bool:
        """Whether the checkpoint of step ``done`` is to be saved."""
        checkpoint = self.config.checkpoint
        at_end = done == self.config.total_steps and checkpoint.save_at_end
        return stopping or at_end or bool(checkpoint.interval and done % checkpoint.interval == 0)

    def save(self, done: int) -> None:
        """Write the checkpoint of step ``done`` unless it exists already."""
        if self.saved_at == done:
            return
        began = time.perf_counter()
        with self.reporter.outside_throughput():
            path = save_checkpoint(
                self.run_dir.checkpoints,
                done,
                self.trainer.checkpoint_tensors(),
                meta=self._meta(done),
                rank_state=capture_rng(self.processes.device) | self.trainer.rank_tensors(),
                group=self.processes.control,
                keep_last=self.config.checkpoint.keep_last,
            )
        self.saved_at = done
        self.reporter.checkpoint(done, path, time.perf_counter() - began)

    def _meta(self, done: int) -> dict[str, Any]:
        return {
            "fp8train": __version__,
            "config": to_plain(self.config),
            "vocab_size": self.data.vocab_size,
            "tokenizer": None if self.data.tokenizer is None else str(self.data.tokenizer.path),
            "data": self.data.train.state_dict(done),
            "trainer": self.trainer.state_meta(),
        }
