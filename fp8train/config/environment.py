"""What the launcher says about this process, from the environment variables that torchrun sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fp8train.config.errors import ConfigError

_NEEDED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = "start with launch/torchrun.sh or torchrun, or unset WORLD_SIZE for a single process"


@dataclass(frozen=True)
class World:
    """This process among the processes of the job.

    Attributes:
        size: processes in the job.
        rank: this one's number.
        local_size: processes on this node.
        local_rank: this one's number on its node.
        supervised: whether a launcher ends the others when one of them ends, so that one may refuse alone.
    """

    size: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0
    supervised: bool = True


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """This process's place as torchrun sets it; a single process without ``WORLD_SIZE``, or with 1.

    Raises:
        ConfigError: a variable is not a number, out of range, or missing beside a larger ``WORLD_SIZE``.
    """
    size = _number(environment, "WORLD_SIZE", 1, None) if "WORLD_SIZE" in environment else 1
    if size == 1:
        return World()
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"WORLD_SIZE is {size} but {', '.join(missing)} {verb} not set; {_REMEDY}")
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1, size)
    return World(
        size,
        _number(environment, "RANK", 0, size - 1),
        local_size,
        _number(environment, "LOCAL_RANK", 0, local_size - 1),
        "TORCHELASTIC_RUN_ID" in environment,
    )


def check_started_world(size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Whether ``WORLD_SIZE``, where somebody set it for a launcher, is the ``size`` that it starts.

    Raises:
        ConfigError: it is not, so that one of the two would be ignored.
    """
    if "WORLD_SIZE" in environment and environment["WORLD_SIZE"] != str(size):
        raise ConfigError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']!r} in the environment, but {size} "
            f"{'process is' if size == 1 else 'processes are'} to be started\n"
            "unset WORLD_SIZE, and say with NPROC how many processes to start"
        )


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    text = environment[name]
    legal = f"a whole number from {least} on" if most is None else f"a whole number from {least} to {most}"
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise ConfigError(f"{name} is {text!r} in the environment, not {legal}; {_REMEDY}")
    return value
