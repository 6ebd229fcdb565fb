"""The command and its groups, and what several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8train.config.errors import UserError

app = typer.Typer(
    name="fp8train",
    help="Pretrain GPT and Llama models, FP8 end to end.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make and look at datasets.")
app.add_typer(data_app, name="data")
report_app = typer.Typer(help="Tables and plots from a run's records.")
app.add_typer(report_app, name="report")
import_app = typer.Typer(help="Models from elsewhere.")
app.add_typer(import_app, name="import")
export_app = typer.Typer(help="Write a checkpoint in another format.")
app.add_typer(export_app, name="export")
launch_app = typer.Typer(help="Start a run on a cluster.")
app.add_typer(launch_app, name="launch")


Options = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, laid over the file in order", show_default=False),
]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint folder, or run directory for its newest one")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", help="auto takes CUDA where a device is visible."),
]


def require_checkpoint(path: Path) -> None:
    """Refuse a path without a checkpoint before anything heavy is imported.

    Raises:
        UserError: what is there instead.
    """
    from fp8train.config.places import no_checkpoint_at

    if problem := no_checkpoint_at(path):
        raise UserError(problem)


def write(text: str) -> None:
    """Print now, so that a closed pipe (``| head``) is noticed inside the command and ends it quietly."""
    sys.stdout.write(text)
    sys.stdout.flush()
