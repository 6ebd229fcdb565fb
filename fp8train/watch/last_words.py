"""How a rank ends in a hang: what it leaves behind, who says why, and that it does end.

The main thread may be stuck in C and cannot be asked, so all of this happens in the watchdog's thread, and
the process leaves through ``os._exit``. Nothing here may hang either: a timer is set first.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from fp8train.comm.failures import Failure, record, speaks
from fp8train.config.watchdog_schema import WatchdogConfig
from fp8train.run_dir.directory import RunDir
from fp8train.watch.process import kill
from fp8train.watch.watchdog import Found

HUNG = 5
"""Exit status of a run that hung."""

_END_S = 4.0
_ADVICE = (
    "what every rank was at is in {stacks}\n"
    "continue with checkpoint.resume=auto; the section watchdog says how long a run may stand still"
)


@dataclass(frozen=True)
class LastWords:
    """Ends this rank as one of a run that hung.

    Attributes:
        settings: of the watchdog.
        run_dir: of the run.
        done: steps done.
        settled: the exit status on record, once the run is over.
        say: prints what a person must read.
        leave: ends the process.
    """

    settings: WatchdogConfig
    run_dir: RunDir
    done: Callable[[], int]
    settled: Callable[[], int | None]
    say: Callable[[str], None]
    leave: Callable[[int], object] = os._exit

    def __call__(self, found: Found, publish: Callable[[], bool]) -> None:
        """Leave everything that is of use, and end; see :class:`~fp8train.watch.watchdog.Ending`."""
        timer = threading.Timer(_END_S, self.leave, (HUNG,))
        timer.daemon = True
        timer.start()
        if (settled := self.settled()) is not None:  # closing trackers or groups hangs: nothing is lost by it
            timer.cancel()
            self.leave(settled)
            return
        stacks = self.run_dir.rank_log.with_name(f"stacks_rank{self.run_dir.rank}.txt")
        message = found.verdict.message
        if self.settings.stacks:
            message += "\n" + _ADVICE.format(stacks=stacks.with_name("stacks_rank*.txt"))
        guilty = found.verdict.guilty[0] if found.verdict.guilty else self.run_dir.rank
        failure = Failure(guilty, message, HUNG, time=time.time())
        record(failure)  # before a peer can notice
        first = found.own and publish()
        if speaks(failure, otherwise=first):
            self.say(failure.last_word())
        if first:
            self.run_dir.write_failure(failure, step=self.done())
        else:
            with suppress(OSError):
                self.run_dir.log(f"error: {message}")
        if self.settings.stacks:
            self._dump(stacks)
        # The others read the verdict within an interval. Whoever leaves before, or is killed, takes the
        # connections away that their main threads wait in, and they would fail with that.
        time.sleep(min(2 * self.settings.interval_s, 2.0))
        for process in found.dead.values():
            kill(process)  # nothing else ends one that is stopped; a launcher would try for half a minute
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        timer.cancel()
        self.leave(HUNG)

    def _dump(self, path: os.PathLike[str]) -> None:
        with suppress(OSError), open(path, "w") as file:
            file.write(time.strftime("%Y-%m-%dT%H:%M:%SZ, most recent call first\n", time.gmtime()))
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if torch.cuda.is_initialized():
            writer = threading.Thread(target=self._dump_nccl, daemon=True)
            writer.start()
            writer.join(1.0)

    def _dump_nccl(self) -> None:
        """NCCL's flight record: which collectives it has started and finished, as a pickle for
        ``torchfrtrace``. **Unmeasured**: no machine with two GPUs was at hand."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None:
            path = self.run_dir.rank_log.with_name(f"nccl_trace_rank_{self.run_dir.rank}")
            with suppress(OSError, RuntimeError):
                path.write_bytes(dump())
