"""Weights & Biases in a thread of its own.

The library talks to a network and to a helper process; both can hang, fail or die at any call. So every call
is made by one daemon thread, fed through a bounded queue: the training thread never waits for it. When the
thread falls behind, the oldest records are dropped and counted; when a call fails, the thread reports that
once and takes nothing more.

The run's id is chosen here and kept in the run directory before the library is even imported, so that a
resumed run continues the same curves whatever happened the first time. Steps are sent as a number of the
record, not as W&B's own step, which may not go back: after a resume it does.
"""

from __future__ import annotations

import importlib
import os
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8train.config.all_sections import WandbConfig

QUEUE_RECORDS = 1000
"""Records kept while W&B does not answer; older ones are dropped."""

INIT_TIMEOUT_S = 60.0
_BEST = {
    "train/loss_mean": "min",
    "eval/loss": "min",
    "throughput/tokens_per_second": "max",
    "fp8/snr_db_min": "min",
    "fp8/saturated": "max",
    "time/step_max_s": "max",
}
"""What a table of runs shows of a curve besides its end."""

CLOSE_TIMEOUT_S = 30.0
"""At the end of a run W&B gets this long to upload the rest."""


def kept_run_id(run_dir: Path) -> str:
    """The run's W&B id from ``wandb/run_id``, made and written there first if there is none."""
    path = run_dir / "wandb" / "run_id"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        run_id = secrets.token_hex(6)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(run_id + "\n")
    except OSError:
        pass  # a full disk: this run is shown, a resumed one will get curves of its own
    return run_id


class WandbTracker:
    """Curves on Weights & Biases. Every method returns at once, but ``close`` may wait."""

    name = "wandb"

    def __init__(
        self,
        settings: WandbConfig,
        *,
        directory: Path,
        run_id: str,
        run_name: str,
        run_config: Mapping[str, Any],
        init_timeout_s: float = INIT_TIMEOUT_S,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
        queue_records: int = QUEUE_RECORDS,
    ) -> None:
        """The environment variable ``WANDB_MODE`` (``online``, ``offline``, ``disabled``) overrides
        ``mode``."""
        self._mode = os.environ.get("WANDB_MODE") or settings.mode
        self._settings = settings
        self._directory = directory
        self._identity = {"id": run_id, "name": run_name, "config": dict(run_config)}
        self._init_timeout_s, self._close_timeout_s = init_timeout_s, close_timeout_s
        self._limit = queue_records
        self._lock = threading.Condition()
        # Guarded by the lock:
        self._queue: deque[dict[str, Any]] = deque()
        self._final_status: str | None = None
        self._failed = False
        self._dropped = 0
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Queue the numbers of a step for the thread; the oldest record is dropped where the queue is
        full."""
        with self._lock:
            if self._failed:
                return
            if len(self._queue) >= self._limit:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append({"step": step, "tokens": tokens, **metrics})
            self._lock.notify()

    def close(self, status: str) -> None:
        """Let the thread finish within the close timeout, then go on without it."""
        with self._lock:
            self._final_status = status
            self._lock.notify()
        self._thread.join(self._close_timeout_s)
        with self._lock:
            if self._thread.is_alive() and not self._failed:
                self._problems.append(
                    f"did not finish within {self._close_timeout_s:g} s, {len(self._queue)} records unsent; "
                    f"what it kept is under {self._directory / 'wandb'}, for `wandb sync`"
                )
            if self._dropped:
                self._problems.append(f"{self._dropped} records were dropped because it was too slow")
            self._failed = True

    def take_problem(self) -> str | None:
        """Return what went wrong since the last call, if anything; each problem once."""
        with self._lock:
            problems, self._problems = self._problems, []
        return "; ".join(problems) or None

    def _work(self) -> None:
        try:
            run = self._start()
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._queue or self._final_status is not None)
                    record = self._queue.popleft() if self._queue else None
                    status = self._final_status
                if record is not None:
                    run.log(record)
                else:
                    run.finish(exit_code=1 if status == "failed" else 0)
                    return
        except Exception as error:  # another project's code, a network, a helper process: anything may come
            self._fail(error)

    def _start(self) -> Any:
        wandb = importlib.import_module("wandb")
        if self._mode == "online" and not wandb.login(prompt=False):  # init would ask at the terminal
            raise RuntimeError(
                "no API key; run `wandb login`, set WANDB_API_KEY, or use logging.wandb.mode=offline"
            )
        run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            dir=str(self._directory),
            mode=self._mode,
            resume="allow",
            settings=wandb.Settings(
                init_timeout=self._init_timeout_s,
                finish_timeout=self._close_timeout_s,
                console="off",  # it would wrap stdout of the whole process
                silent=True,
            ),
            **self._identity,
        )
        # The part of a name before the slash (train, time, fp8, ...) makes a section of panels by itself.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        for name, best in _BEST.items():
            run.define_metric(name, step_metric="step", summary=f"{best},last")
        return run

    def _fail(self, error: Exception) -> None:
        first_line = (str(error).splitlines() or [""])[0]
        with self._lock:
            if not self._failed:
                self._problems.append(f"{type(error).__name__}: {first_line}")
            self._failed = True
            self._queue.clear()
