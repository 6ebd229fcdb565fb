"""Commands about a run: train, config, verify, doctor, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fp8train.cli.app import Options, app, report_app, require_checkpoint, write
from fp8train.config.errors import UserError


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Options = None,
) -> int:
    """Train. Use torchrun for more than one process: torchrun --nproc-per-node=8 -m fp8train train CONFIG."""
    from fp8train.cli.train_command import train_command

    return train_command(config, overrides or (), context.obj)


@app.command(name="config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run", show_default=False)] = None,
    overrides: Options = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the resolved config as YAML.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema for editors.")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Print all keys as Markdown.")] = False,
    world: Annotated[
        int | None,
        typer.Option(min=1, help="Check that this many processes can run it.", show_default=False),
    ] = None,
    recipe: Annotated[
        bool,
        typer.Option("--recipe", help="Print formats, scales, multipliers and rates of every layer."),
    ] = False,
    summary: Annotated[
        bool,
        typer.Option("--summary", help="Print what the run would be: sizes, bytes, layout, FP8 coverage."),
    ] = False,
) -> None:
    """Print every value of a run and where it came from."""
    if sum((yaml, schema, reference, recipe, summary)) > 1:
        raise UserError("--yaml, --schema, --reference, --recipe and --summary exclude each other")
    if schema or reference:
        if config is not None or world is not None:
            raise UserError("--schema and --reference describe every config; leave out CONFIG and --world")
        from fp8train.config.editor_schema import dump_editor_schema
        from fp8train.config.explain import reference as markdown_reference

        write(dump_editor_schema() if schema else markdown_reference())
        return
    if config is None:
        raise UserError("name a config file, or ask for --schema or --reference")
    from fp8train.config.dump import dump_yaml
    from fp8train.config.explain import explain
    from fp8train.config.resolve import load_config

    resolved = load_config(config, overrides or ())
    if world is not None:
        from fp8train.config.world import check_world

        check_world(resolved.config, world, origins=resolved.origins)
    if summary:
        from fp8train.planning.summary import summarise

        write(summarise(resolved, world))
        return
    if recipe:
        from fp8train.planning.recipe_table import describe_recipe

        write(describe_recipe(resolved.config))
        return
    write(dump_yaml(resolved.config) if yaml else explain(resolved, os.environ))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint, checkpoints directory or run directory")],
) -> int:
    """Check checkpoints completely; one line for each, exit status 0 or 2."""
    require_checkpoint(path)
    from fp8train.checkpoint.examine import verify_command

    return verify_command(path)


@app.command()
def doctor() -> int:
    """Report what this machine can run, and why not."""
    from fp8train.cli.doctor import doctor as examine

    return examine()


@report_app.command()
def scales(
    run: Annotated[Path, typer.Argument(help="Run directory, of a finished or a running job")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the plots and numbers; default: RUN/report.")
    ] = None,
) -> int:
    """Show the scales of a run's FP8 casts by layer, linear and step, and what they flushed or saturated."""
    from fp8train.reporting.scales import report_scales

    return report_scales(run, out)
