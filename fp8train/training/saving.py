"""When a run saves, and what: the side of checkpoints that the training loop sees.

A checkpoint is the trainer's tensors, this rank's random states and a description (configuration, place in
the data, host state, validation loss) that is enough to continue or to use the model without the command that
trained it.

With ``checkpoint.asynchronous`` a save only begins here and ends at a later step boundary, where all ranks
learn of it together. The next save, the end of the run and a stop wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fp8train import __version__
from fp8train.checkpoint.background import BackgroundSaver, Written
from fp8train.checkpoint.catalog import read_pointer
from fp8train.checkpoint.errors import CheckpointError, NotFiniteError
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.readback import describe
from fp8train.checkpoint.retention import EVAL_LOSS, FINITE, Retention
from fp8train.checkpoint.rng import capture_rng
from fp8train.checkpoint.save import Order, SavePhase, no_hook, with_rank_state, write_checkpoint
from fp8train.checkpoint.visibility import View
from fp8train.config.argument_keys import naming_keys
from fp8train.config.schema import to_plain
from fp8train.evaluation.validation import Evaluation
from fp8train.run_dir.metrics import strict
from fp8train.step.non_finite import DivergedError
from fp8train.step.result import StepResult
from fp8train.training.ready_run import ReadyRun

_GRACE_S = 30.0
"""How long a run that failed waits for a checkpoint in flight."""


class Saving:
    """Saves the checkpoints of a run.

    Attributes:
        saved_at: the step of the newest checkpoint, saved, begun or resumed from; None without one.
        on_phase: called at the moments of a save, in the thread that writes.
        last_step: what the last step did; None before the first one.
        longest_s: seconds that the longest save took, from its beginning until it was safe; 0 before the
            first one.
    """

    def __init__(self, run: ReadyRun) -> None:
        """Prepare saving; collective over all ranks with ``checkpoint.asynchronous``."""
        self._run, self.config = run, run.config
        self.processes, self.trainer, self.reporter = run.processes, run.trainer, run.reporter
        self.saved_at: int | None = None
        self.on_phase: Callable[[SavePhase], None] = no_hook
        self.last_step: StepResult | None = None
        self.longest_s = 0.0
        self._postponed = False
        checkpoint = run.config.checkpoint
        self._retention = Retention(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_best)
        self._background = BackgroundSaver(run.processes.control) if checkpoint.asynchronous else None
        self._stall_seconds = 0.0

    def due(self, done: int, *, stopping: bool) -> bool:
        """Whether the checkpoint of step ``done`` is to be saved. One that is due while steps are skipped is
        put off to the next step that is applied: what makes them skip may be in the weights."""
        checkpoint = self.config.checkpoint
        at_end = done == self.config.total_steps and checkpoint.save_at_end
        if stopping or at_end:
            return True
        due = self._postponed or bool(checkpoint.interval and done % checkpoint.interval == 0)
        if due and self.last_step is not None and self.last_step.skipped not in ("", "no_targets"):
            if not self._postponed:
                self.reporter.checkpoint_postponed(done, self.last_step.skipped)
            self._postponed = True
            return False
        return due

    def went_back(self, step: int) -> None:
        """The run goes on from the checkpoint of ``step``."""
        self.saved_at, self._postponed = step, False

    def save(self, done: int, evaluation: Evaluation | None, *, last: bool) -> None:
        """Write the checkpoint of step ``done``, or begin to, unless it exists already.

        Args:
            done: steps done.
            evaluation: of this step's weights, if they were evaluated.
            last: nothing is saved after it, so that a failure is an error whatever ``on_failure`` says.

        Raises:
            CheckpointError: it, or the one in flight, could not be saved; on every rank.
        """
        if self.saved_at == done:
            return
        self._postponed = False
        began = time.perf_counter()
        with self.reporter.throughput.excluded():
            self._finish_previous(done)
            ranks = Ranks(self.processes.control, self.processes.control_calls)
            rank_state = capture_rng(self.processes.device) | self.trainer.rank_tensors()
            tensors = with_rank_state(self.trainer.checkpoint_tensors(), rank_state, ranks.rank)
            order = Order(
                self._run.run_dir.checkpoints,
                done,
                self._meta(done, evaluation),
                describe(tensors),
                self._retention,
                self._moment,
                must_be_finite=tuple(f"{role}/" for role in self.trainer.optimizer.states.roles),
                view=View(self.config.checkpoint.visibility_timeout_s),
            )
            self.saved_at = done
            if self._background is None:
                self._save_now(order, tensors, ranks, began, last=last)
                return
            first = self._background.snapshot.num_bytes == 0
            self._background.start(order, tensors)
        self._stall_seconds = time.perf_counter() - began
        if first:
            size = self._background.snapshot.num_bytes / 2**20
            self.reporter.say(f"asynchronous checkpoints keep {size:,.1f} MiB of host memory on this rank")

    def _moment(self, phase: SavePhase) -> None:
        self.trainer.progress.beat()  # of a writing thread too: what it does is no hang
        self.on_phase(phase)

    def poll(self) -> None:
        """At a step boundary: report the checkpoint in flight if all ranks are done with it, raise its error
        by policy. Collective while one is in flight."""
        if self._background is not None and self._background.step is not None:
            self._settle(self._background.poll)

    def finish(self) -> None:
        """At the end: wait for the checkpoint in flight. Its error is raised whatever the policy, for no
        later one will make up for it. Collective."""
        if self._background is not None and self._background.step is not None:
            self._settle(self._background.wait, last=True)

    def abandon(self, *, wait: bool) -> None:
        """Training failed, perhaps on this rank alone: give a checkpoint in flight some seconds to be
        finished, or none without ``wait``. Never raises."""
        if self._background is not None:
            written = self._background.abandon(grace_s=_GRACE_S if wait else 0.0)
            if written is not None:
                self._report(written)

    def _save_now(
        self, order: Order, tensors: dict[str, LogicalTensor], ranks: Ranks, began: float, *, last: bool
    ) -> None:
        def write() -> Written:
            num_bytes = write_checkpoint(order, tensors, ranks)
            self._stall_seconds = time.perf_counter() - began
            return Written(order.step, order.final, num_bytes, self._stall_seconds)

        self._settle(write, last=last)

    def _finish_previous(self, done: int) -> None:
        """At most one save in flight: wait for it and tell, because it means that the interval is too short
        for the disk."""
        if self._background is None or (previous := self._background.step) is None:
            return
        began = time.perf_counter()
        self._settle(self._background.wait)
        seconds = time.perf_counter() - began
        self.reporter.checkpoint_waited(done, previous=previous, seconds=seconds)

    def _settle(self, outcome: Callable[[], Written | None], *, last: bool = False) -> None:
        """Report what was saved, or treat its failure by policy: what the user can mend is, a bug never
        goes on."""
        step = self.saved_at
        assert step is not None
        try:
            with naming_keys():
                written = outcome()
        except NotFiniteError as error:
            self.saved_at = None
            self._not_finite(step, error)
            return
        except CheckpointError as error:
            self.saved_at = None
            if last or self.config.checkpoint.on_failure == "stop":
                raise
            self.reporter.checkpoint_failed(step, error)
            return
        if written is not None:
            self._report(written)

    def _not_finite(self, step: int, error: NotFiniteError) -> None:
        """A state that nobody can continue from replaces none that one can. A run that was to be stopped is,
        and one that goes on ends by its skipped steps; but none ends as completed so."""
        root = self._run.run_dir.checkpoints
        self.reporter.checkpoint_not_finite(step, error, read_pointer(root))
        if step == self.config.total_steps:
            raise DivergedError(
                f"step {step}: {error}; the state at the end was not saved\n"
                "resume from the newest checkpoint with a lower optimizer.lr"
            )

    def _report(self, written: Written) -> None:
        in_background = self._stall_seconds if self._background is not None else 0.0
        self.longest_s = max(self.longest_s, written.write_seconds + in_background)
        self.reporter.checkpoint(
            written, stall_seconds=self._stall_seconds, asynchronous=self._background is not None
        )

    def _meta(self, done: int, evaluation: Evaluation | None) -> dict[str, Any]:
        data, last = self._run.data, self.last_step
        return {
            "fp8train": __version__,
            "config": to_plain(self.config),
            "vocab_size": data.vocab_size,
            "tokenizer": None if data.tokenizer is None else str(data.tokenizer.path),
            "data": data.train.state_dict(done),
            "trainer": self.trainer.state_meta(),
            "last_step": None
            if last is None
            else {"applied": last.applied, "grad_norm": strict(last.grad_norm)},
            FINITE: True,  # or it is not written
            EVAL_LOSS: None if evaluation is None else strict(evaluation.loss),
        }
