"""``fp8train train`` as a command: what it says at once, what it catches, and how it is started again.

Importing torch takes seconds. What is here comes before it: the line that says what starts, and the answers
to signals that arrive meanwhile.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fp8train.config.environment import world_from_environment
from fp8train.config.resolve import ResolvedConfig, load_config
from fp8train.config.threads import threads_from_environment
from fp8train.live.console import Console
from fp8train.training.signals import StopRequest

LAUNCHER = "FP8TRAIN_LAUNCHER"
"""Environment variable in which a launch script leaves itself, in the shell's words. It takes CONFIG and
overrides, and continues by itself."""

_ASKED_ANEW = ("checkpoint.resume=", "run.overwrite=")


def train_command(config: Path, overrides: Sequence[str], lifetime: ExitStack) -> int:
    """Train as ``config`` with ``overrides`` says; returns the exit status. Signals are answered until
    ``lifetime`` ends.

    Raises:
        UserError: anything the user can mend; a typo before torch is imported.
    """
    resolved = load_config(config, overrides)
    world = world_from_environment()
    if resolved.config.run.threads is None:
        threads_from_environment(os.environ)
    first = os.environ.get("RANK", "0") == "0"
    again = continue_command(config, overrides, resolved)
    stop = lifetime.enter_context(StopRequest())
    with Console(enabled=first) as console:
        stop.say = console.say
        if LAUNCHER not in os.environ:  # a launch script has said so
            console.say(starting_line(config, resolved))
        for line in resolved.taken_back:
            console.say(line)
        from fp8train.training.preflight import preflight

        data = preflight(resolved, world)
        from fp8train.training.run import run  # last, because of torch: a mistake is reported at once

        return run(resolved.config, world, data, console=console, stop=stop, again=again)


def starting_line(config: Path, resolved: ResolvedConfig) -> str:
    """What is about to run, as far as it is known without torch."""
    settings = resolved.config
    count = int(os.environ.get("WORLD_SIZE", "1"))
    processes = "1 process" if count == 1 else f"{count} processes"
    return (
        f"starting {config}: {settings.model.family} at {settings.precision.level}, "
        f"{settings.total_steps} steps, {processes}; run {Path(settings.run.dir, settings.run.name)}"
    )


def continue_command(config: Path, overrides: Sequence[str], resolved: ResolvedConfig) -> str:
    """The shell command that continues this run, with as many processes: what was typed, but for what a new
    run asks for. In words for several nodes, which something else started."""
    count, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    kept = [word for word in overrides if not word.startswith(_ASKED_ANEW)]
    if resolved.config.run.overwrite and not any(word.startswith("run.overwrite=") for word in overrides):
        kept.append("run.overwrite=false")  # the file has it
    launcher = os.environ.get(LAUNCHER)
    if launcher:
        return f"{launcher} {shlex.join([str(config), *kept])}"
    if count != here:
        return "the command that started it, with checkpoint.resume=auto"
    program = _program()
    if count != "1":
        program = ["torchrun", "--standalone", f"--nproc-per-node={count}", "-m", "fp8train"]
    return shlex.join([*program, "train", str(config), *kept, "checkpoint.resume=auto"])


def _program() -> list[str]:
    """This program as it can be typed: its name where the shell finds it under that, else its path."""
    script = Path(sys.argv[0])
    if script.name != "fp8train":
        return ["python", "-m", "fp8train"]
    found = shutil.which("fp8train")
    known = found is not None and Path(found).absolute() == script.absolute()
    return ["fp8train" if known else str(script)]
