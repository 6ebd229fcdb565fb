"""What happens around a step that went wrong: telling, counting, and going back to a checkpoint.

A run goes back in place, in the processes that it has: weights, optimizer states, scale state, random states
and data position become those of the newest good checkpoint, and records after it are cut off, as by a
resume.
What must not be forgotten with them stays: that and why the run went back (an event of the checkpoint's step,
written before anything is cut), how often it did, and which data it leaves out from now on.

That much is in no file until the next checkpoint. A run that dies before it resumes from the same checkpoint,
meets the same steps, and goes back in the same way.
"""

from __future__ import annotations

from fp8train.checkpoint.catalog import find_checkpoint
from fp8train.checkpoint.load import open_checkpoint
from fp8train.step.non_finite import SkippedSteps
from fp8train.step.result import Rewind, StepResult
from fp8train.training.ready_run import ReadyRun
from fp8train.training.resume import fill
from fp8train.training.saving import Saving


class Safeguards:
    """Deals with what stood out in the steps of a run."""

    def __init__(self, run: ReadyRun, saving: Saving) -> None:
        """``saving``: told when the run goes back."""
        self._run, self._saving, self._reporter = run, saving, run.reporter
        self._skipped = SkippedSteps(run.config.train.max_skipped_steps)

    def after(self, done: int, result: StepResult) -> int | None:
        """Report step ``done`` (1-based) as far as it stood out, and go back to a checkpoint if that is
        wanted. Collective over all ranks then.

        Returns:
            Steps done now, if the run went back.

        Raises:
            DivergedError: too many steps in a row were skipped.
            NoTargetsError: likewise.
        """
        self._saving.last_step = result
        self._reporter.stood_out(done, result.events)
        if not result.applied:
            self._reporter.skipped(done, result)
        if result.rewind is not None:
            back = self._go_back(done, result.rewind)
            if back is not None:
                return back
        self._skipped.count(done, result)
        return None

    def _go_back(self, done: int, rewind: Rewind) -> int | None:
        run, monitors, data = self._run, self._run.trainer.monitors, self._run.data.train
        run.trainer.progress.enter("restore")
        self._saving.finish()
        path = find_checkpoint(run.run_dir.checkpoints, "auto", group=run.processes.control)
        if path is None:
            self._reporter.event("rollback_impossible", step=done, cause=rewind.cause)
            self._reporter.say(f"step {done}: no checkpoint to go back to yet; training goes on")
            return None
        with self._reporter.throughput.excluded():
            opened = open_checkpoint(path, group=run.processes.control, verify="size")
            target = opened.manifest.step
            left_out = list(data.left_out)
            if rewind.skip_data:
                first = max(target, done - run.config.spikes.data_window)
                left_out.append(data.stretch(first, done))
            self._reporter.event(
                "rollback",
                step=target,
                from_step=done,
                cause=rewind.cause,
                checkpoint=str(path),
                number=monitors.rewinds + 1,
                pinned=dict(rewind.pinned),
                left_out=[list(stretch) for stretch in left_out],
            )
            rewinds = monitors.rewinds + 1
            actions = 0 if monitors.guard is None else monitors.guard.actions
            fill(run, opened)
            data.leave_out(left_out)
            monitors.rewound(rewinds=rewinds, actions=actions, pinned=rewind.pinned)
            run.run_dir.truncate_after(target)
        self._skipped.forget()
        self._saving.went_back(target)
        self._reporter.rewound()
        what = (
            f"without the data of its last {done - first} steps" if rewind.skip_data else "with the same data"
        )
        self._reporter.say(
            f"step {done}: went back to {path} ({rewinds} of at most {run.config.spikes.max_rollbacks}), and "
            f"goes on {what}"
        )
        return target
