"""The training loop: steps, and what happens between them.

Order within a step: data, step, log, evaluation, agreement on stopping, checkpoint. Everything that belongs
to step k is logged before checkpoint k is written, so a resumed run's records continue where the checkpoint's
end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fp8train.evaluation.validation import Evaluation, Text, evaluate
from fp8train.step.consistency import check_replicas
from fp8train.training.ready_run import ReadyRun
from fp8train.training.safeguards import Safeguards
from fp8train.training.saving import Saving
from fp8train.training.signals import Stop


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``state`` and ``reason`` as in status.json."""

    state: Literal["completed", "stopped", "preempted"]
    reason: str
    step: int


class TrainingLoop:
    """Runs a prepared trainer from its current step to the end or to a stop request."""

    def __init__(self, run: ReadyRun, *, agree_to_stop: Callable[[], Stop | None], start: int = 0) -> None:
        """``agree_to_stop`` is called by all ranks after each step and returns the same answer on all;
        ``start``: steps that a checkpoint has done. ``done`` counts on from there."""
        self._run, self.agree_to_stop = run, agree_to_stop
        self.config, self.trainer, self.reporter = run.config, run.trainer, run.reporter
        self.progress = run.trainer.progress
        self.start = self.done = start
        self.saving = Saving(run)
        self._safeguards = Safeguards(run, self.saving)
        self.saving.saved_at = start or None

    def run(self) -> Outcome:
        """Train. Returns when all steps are done or a stop was agreed on; the state is saved then."""
        try:
            outcome = self._steps()
            self.saving.finish()
        except BaseException as error:
            self.saving.abandon(wait=not isinstance(error, KeyboardInterrupt))
            raise
        return outcome

    def _steps(self) -> Outcome:
        total = self.config.total_steps
        self.reporter.begin(self.start)
        if self.start >= total:
            return Outcome("completed", f"all {total} steps were done already", self.start)
        while self.done < total:
            back = self._one_step(self.done)
            if back is not None:
                self.done = back
                continue
            self.done = done = self.done + 1
            self._check_replicas(done)
            evaluation = None
            if self._evaluation_due(done):
                self.progress.enter("evaluate")
                evaluation = self._evaluate()
                self.reporter.evaluation(done, evaluation)
            self.progress.enter("agree")
            self.saving.poll()
            stop = self.agree_to_stop()
            if self.saving.due(done, stopping=stop is not None):
                self.progress.enter("save")
                self.saving.save(done, evaluation, last=stop is not None or done == total)
            if stop is not None and done < total:
                self._run.run_dir.clear_stop()
                return Outcome(stop.state, stop.reason, done)
        return Outcome("completed", "all steps done", total)

    def _one_step(self, step: int) -> int | None:
        """Train one step; the number of steps done if the run went back to a checkpoint instead."""
        began = time.perf_counter()
        self.progress.enter("data", step=step)
        batch = self._run.data.train.batch(step)
        fetched = time.perf_counter()
        monitors, interval = self.trainer.monitors, self.config.logging.cast_statistics_interval
        recorder = monitors.recorder
        sampled = interval > 0 and (step == 0 or (step + 1) % interval == 0)
        if recorder is not None:
            recorder.active = sampled
        result = self.trainer.step(step, batch)
        self.progress.enter("report")
        if recorder is not None:
            recorder.active = False
            if sampled:
                optimizer = monitors.optimizer_metrics(self.trainer.optimizer) if result.applied else {}
                self.reporter.casts(step + 1, monitors.cast_rows(), optimizer)
        if sampled:
            with self.reporter.throughput.excluded():
                self.reporter.monitor(monitors.attention_metrics())
        back = self._safeguards.after(step + 1, result)
        if back is None:
            self.reporter.step(step + 1, result, data_seconds=fetched - began)
        return back

    def _check_replicas(self, done: int) -> None:
        interval = self.config.train.consistency_interval
        if interval and done % interval == 0:
            check_replicas(self.trainer)

    def _evaluation_due(self, done: int) -> bool:
        interval = self.config.train.eval_interval
        return bool(interval) and (done % interval == 0 or done == self.config.total_steps)

    def _evaluate(self) -> Evaluation:
        data = self._run.data
        assert data.valid is not None, "seen before the run"
        with self.reporter.throughput.excluded():
            text = Text(
                data.valid, self.config.train.eval_batches, self.trainer.ignore_after, data.token_lengths
            )
            return evaluate(self._summed_loss, text, self._run.processes)

    def _summed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.progress.beat()  # an evaluation takes as long as it has batches
        return self.trainer.summed_loss(inputs, targets)
