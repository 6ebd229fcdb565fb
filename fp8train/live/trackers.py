"""TensorBoard and Weights & Biases behind one interface; neither can stop or slow a run.

Both show what ``metrics.jsonl`` already holds, so whatever goes wrong in them costs a curve on a web page,
not data: it is reported once as an event, and the tracker is left alone from then on.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fp8train.config.all_sections import LoggingConfig
from fp8train.live.wandb_tracker import WandbTracker, kept_run_id
from fp8train.run_dir.directory import RunDir

# Shown against tokens too: TensorBoard has one x-axis, so these get a second curve.
_BY_TOKENS = ("train/loss", "train/loss_mean", "eval/loss")
_FLUSH_S = 30.0


class Trackers:
    """The trackers that the configuration asks for; none on ranks other than 0. No method of one raises, and
    only ``close`` may wait."""

    def __init__(
        self,
        logging: LoggingConfig,
        run_dir: RunDir,
        event: Callable[..., None],
        *,
        run_name: str,
        run_config: Mapping[str, Any],
    ) -> None:
        """``event`` is told about trackers that fail, as ``RunDir.log_event`` is; ``run_config`` is what W&B
        shows as the run's settings."""
        self._event = event
        self._step = 0
        self._trackers: list[TensorBoardTracker | WandbTracker] = []
        if run_dir.rank == 0 and logging.tensorboard:
            self._trackers.append(TensorBoardTracker(run_dir.tensorboard))
        if run_dir.rank == 0 and logging.wandb.mode != "off":
            self._trackers.append(
                WandbTracker(
                    logging.wandb,
                    directory=run_dir.path,
                    run_id=kept_run_id(run_dir.path),
                    run_name=run_name,
                    run_config=run_config,
                )
            )

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Show the numbers of a step on every tracker, and report trackers that failed."""
        self._step = step
        for tracker in self._trackers:
            tracker.log(step, tokens, metrics)
        self._report()

    def rewound(self) -> None:
        """The run went back to an earlier step."""
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.rewound()

    def close(self, status: str = "failed") -> None:
        """Finish every tracker with this status, as in status.json. Waits a bounded
        time for what is still under way."""
        for tracker in self._trackers:
            tracker.close(status)
        self._report()
        self._trackers = []

    def _report(self) -> None:
        for tracker in self._trackers:
            problem = tracker.take_problem()
            if problem is not None:
                self._event("tracker_failed", step=self._step, tracker=tracker.name, problem=problem)


class TensorBoardTracker:
    """Event files under ``tb/``. A resumed run hides what an earlier one wrote after the resumed step.

    The library's own writer has a thread, which a full disk ends with a traceback on the screen. Scalars
    need no thread: they are buffered here, and written twice a minute.
    """

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._problem: str | None = None
        self._file: BinaryIO | None = None
        self._record: Callable[..., None] | None = None
        self._flush_at = 0.0
        self._dead = False

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write numbers, to a buffer mostly."""
        if self._dead:
            return
        try:
            if self._record is None:
                self._record = self._begin(step)
            for name, value in metrics.items():
                self._record(name, value, step)
                if name in _BY_TOKENS:
                    self._record(f"{name}_by_tokens", value, tokens)
            if self._file is not None and time.monotonic() >= self._flush_at:
                self._file.flush()
                self._flush_at = time.monotonic() + _FLUSH_S
        except Exception as error:  # another project's code, or a disk
            self._fail(error)

    def close(self, status: str) -> None:
        """Write what is buffered and close the file."""
        if self._file is None:
            return
        file, self._file, self._record = self._file, None, None
        try:
            file.close()
        except OSError as error:
            self._fail(error)

    def rewound(self) -> None:
        """Hide what was written after the step that comes next, in a file of its own."""
        self.close("stopped")
        self._writer = None

    def take_problem(self) -> str | None:
        """Return what went wrong since the last call, if anything; each problem once."""
        problem, self._problem = self._problem, None
        return problem

    def _begin(self, step: int) -> Callable[..., None]:
        """Open a file that takes over from ``step`` on; what writes a scalar into it."""
        # Imported here: a run without TensorBoard need not have it, and it costs a second.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._directory / name).open("xb")
        writer = RecordWriter(self._file)

        def write(**fields: Any) -> None:
            writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

        write(step=step, file_version="brain.Event:2")
        write(step=step, session_log=SessionLog(status=SessionLog.START))
        return lambda name, value, x: write(
            step=x, summary=Summary(value=[Summary.Value(tag=name, simple_value=float(value))])
        )

    def _fail(self, error: Exception) -> None:
        self._dead = True
        self._problem = f"{type(error).__name__}: {error}"
        self.close("failed")
