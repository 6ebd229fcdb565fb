"""The batch script of one run: ``launch/slurm.sbatch`` with the run's own flags and arguments in it.

A script that takes nothing from the command line can be read, kept, and submitted again as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fp8train.config.errors import UserError

_PREFIX = "#SBATCH "


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm is asked for, and what runs there.

    Attributes:
        flags: of sbatch, long ones without dashes: ``{"nodes": "4", "exclusive": None}``. They win over those
            of ``launch/slurm.sbatch``.
        variables: of the environment, set in the script.
        arguments: of ``launch/slurm.sbatch``: the configuration and overrides.
    """

    flags: Mapping[str, str | None]
    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


def template_path() -> Path:
    """``launch/slurm.sbatch`` of this folder, or of the checkout that the package is in.

    Raises:
        UserError: there is none.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        path = root / "launch" / "slurm.sbatch"
        if path.is_file():
            return path
    raise UserError(
        "launch/slurm.sbatch is neither here nor beside the installed package; run this in a checkout of "
        "fp8train"
    )


def flag(text: str) -> tuple[str, str | None]:
    """A flag of sbatch, ``--name=value`` or ``--name``, as a pair.

    Raises:
        UserError: it is written otherwise.
    """
    name, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not name or any(c.isspace() for c in name) or "\n" in text:
        raise UserError(f"--sbatch: {text!r} is no flag of sbatch; write --sbatch=--name=value")
    return name, value if equals else None


def render(job: SlurmJob, template: str, *, note: str) -> str:
    """The text of the script. ``note`` is a comment at its top; ``template``: text of
    ``launch/slurm.sbatch``."""
    lines = template.splitlines()
    flags = dict(flag(line.removeprefix(_PREFIX)) for line in lines if line.startswith(_PREFIX))
    if "no-requeue" in job.flags:
        del flags["requeue"]
    flags |= job.flags
    begin = next(number for number, line in enumerate(lines) if line.startswith("set -"))
    head = [
        "#!/usr/bin/env bash",
        f"# {note}",
        *(
            f"{_PREFIX}--{name}" + ("" if value is None else f"={_quoted(value)}")
            for name, value in flags.items()
        ),
        *(f"export {name}={shlex.quote(value)}" for name, value in job.variables.items()),
        f"set -- {shlex.join(job.arguments)}",
        "",
    ]
    return "\n".join([*head, *lines[begin:], ""])


def _quoted(value: str) -> str:
    """A value as Slurm reads it in a script, where a space would end it."""
    return f'"{value}"' if " " in value else value
