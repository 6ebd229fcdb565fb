"""The ``fp8train`` command.

Every command imports what it needs when it runs, so that ``fp8train config`` answers in a fraction of a
second and needs no torch. What a user can mend (:class:`~fp8train.config.errors.UserError`, a wrong option)
ends with its message on stderr and exit status 2; Ctrl-C with 130; anything else is a bug and keeps its
traceback. Under torchrun only rank 0 prints, every rank exits with the status, and failures are also left
where torchrun looks for them, so that its own summary names the reason.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fp8train.cli import datasets, exchange, models, runs
from fp8train.cli.app import app
from fp8train.config.errors import UserError
from fp8train.training.console import print_safely

__all__ = ["app", "datasets", "exchange", "main", "models", "run_command", "runs"]

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError: newer typer ships click privately


def _print_version(wanted: bool) -> None:
    if wanted:
        from fp8train import __version__

        print(f"fp8train {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of user errors too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Pretrain GPT and Llama models, FP8 end to end."""


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit status; bugs propagate as
    exceptions."""
    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]
    try:
        status = app(args=words or ["--help"], prog_name="fp8train", standalone_mode=False)
    except UserError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_status)
    except _USAGE_ERROR as error:
        if debug:
            raise
        message = cast(Any, error).format_message().rstrip(".")
        return _fail(f"{message}; see  fp8train --help", UserError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        _say("interrupted")
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    """Print ``message`` (rank 0), leave it for torchrun's summary (every rank), and return ``status``."""
    _say(f"error: {message}")
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
    return status


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print_safely(f"{message}\n", sys.stderr)


def _recorded(function: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """``function``, its uncaught exceptions also written where torchrun collects them.

    As torch's own decorator ``record`` does, but torch is imported when there is something to record.
    """

    def recorded(arguments: Sequence[str]) -> int:
        faulthandler.enable(all_threads=True)
        try:
            return function(arguments)
        except Exception as error:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
            raise

    return recorded


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a run
    run = _recorded(run_command) if "TORCHELASTIC_RUN_ID" in os.environ else run_command
    status = run(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what was done is done, and its status is on record
    # Process groups sit in reference cycles (hooks, stores), and only their destruction joins gloo's threads.
    # One that is still at work while the interpreter is torn down aborts a process that has done its job.
    gc.collect()
    sys.exit(status)
