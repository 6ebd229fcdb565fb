"""The ``fp8train`` command.

Every command imports what it needs when it runs, so that ``fp8train config`` answers in a fraction of a
second and needs no torch. What a user can mend (:class:`~fp8train.config.errors.UserError`, a wrong option)
ends with its message on stderr and exit status 2; Ctrl-C with 130; anything else is a bug and keeps its
traceback. With several ranks one prints, or their launcher does (:mod:`fp8train.comm.failures`); every rank
exits with the status.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, Any, cast

import typer

from fp8train.cli import clusters, datasets, import_export, models, runs
from fp8train.cli.app import app
from fp8train.comm.failures import INTERRUPTED, Failure, describe, own_rank, record, speaks
from fp8train.config.argument_keys import naming_keys
from fp8train.config.errors import UserError
from fp8train.config.scalars import shorten
from fp8train.live.console import leave_safely, print_safely

__all__ = ["app", "clusters", "datasets", "import_export", "main", "models", "run_command", "runs"]

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError: newer typer ships click privately
_UNUSABLE_PATH = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""What already asking whether a file is there can end with: the path is the user's to mend, whoever asked."""


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


def run_command(arguments: Sequence[str], lifetime: ExitStack | None = None) -> int:
    """Run one command line (without the program's name) and return its exit status; bugs propagate as
    exceptions. What is to last as long as the process, such as the answers to signals of a run, is entered in
    ``lifetime``; by default it ends with the command."""
    if lifetime is None:
        with ExitStack() as lifetime:
            return run_command(arguments, lifetime)
    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]
    try:
        with naming_keys():
            status = app(args=words or ["--help"], prog_name="fp8train", standalone_mode=False, obj=lifetime)
    except UserError as error:
        if debug:
            raise
        return _fail(describe(error))
    except _USAGE_ERROR as error:
        if debug:
            raise
        message = cast(Any, error).format_message().rstrip(".")
        failure = Failure(own_rank(), f"{message}; see  fp8train --help", UserError.exit_status)
        return _fail(failure)
    except OSError as error:
        if debug or error.filename is None or error.errno not in _UNUSABLE_PATH:
            raise
        return _fail(describe(UserError(f"{shorten(str(error.filename), 200)}: {error.strerror}")))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        return _fail(describe(KeyboardInterrupt()))
    return status if isinstance(status, int) else 0


def _fail(failure: Failure) -> int:
    """Record a failure, print it if this is the rank to do so, and return its status."""
    record(failure)
    if speaks(failure):
        print_safely(f"{failure.last_word()}\n", sys.stderr)
    return failure.exit_status


def _run_as_rank(arguments: Sequence[str], lifetime: ExitStack) -> int:
    """:func:`run_command` under torchrun: of a bug that all ranks meet, or that costs them their peers, one
    traceback is printed."""
    faulthandler.enable()
    try:
        return run_command(arguments, lifetime)
    except Exception as error:
        failure = describe(error)
        record(failure)
        if speaks(failure):
            raise
        return failure.exit_status


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a run
    run = _run_as_rank if "TORCHELASTIC_RUN_ID" in os.environ else run_command
    lifetime = ExitStack()  # not left: until signals are ignored, a run answers them
    try:
        status = run(sys.argv[1:], lifetime)
    except KeyboardInterrupt:  # one more, while the one before was told
        status = INTERRUPTED
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what was done is done, and its status is on record
    # Process groups sit in reference cycles (hooks, stores), and only their destruction joins gloo's threads.
    # One that is still at work while the interpreter is torn down aborts a process that has done its job.
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        leave_safely(stream)
    sys.exit(status)
