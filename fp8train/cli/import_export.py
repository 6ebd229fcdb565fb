"""Commands that bring models in and out: import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8train.cli.app import Checkpoint, export_app, import_app, require_checkpoint, write


@export_app.command()
def states(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", help="NAME.safetensors")],
    states: Annotated[
        Literal["fp32"], typer.Option("--states", help="fp32: decode all states to FP32.")
    ] = "fp32",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Of one file; more than that is split.")
    ] = "5GB",
) -> None:
    """Write master weights and moments as plain numbers, in safetensors."""
    require_checkpoint(checkpoint)
    from fp8train.checkpoint.safetensors_files import parse_size
    from fp8train.inference.export_states import export_states

    write(export_states(checkpoint, output, max_shard_bytes=parse_size(max_shard_size)) + "\n")


_Check = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check", help="Compare logits with transformers; default: where it is installed."
    ),
]
_Text = Annotated[
    Path | None, typer.Option("--text", help="Compare the perplexity of this file's first 1,024 tokens too.")
]


@import_app.command(name="hf")
def import_hf(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors files")],
    output: Annotated[Path, typer.Option("--output", help="Run directory to make.")],
    check: _Check = None,
    text: _Text = None,
) -> int:
    """Make a run directory, with a checkpoint of step 0, from a Llama, GPT-2 or GPT-NeoX of transformers."""
    from fp8train.huggingface.config_json import read_config

    read_config(folder)  # before torch is imported: a wrong folder is reported at once
    from fp8train.huggingface.importing import import_command

    return import_command(folder, output=output, check=check, text=text)


@export_app.command(name="hf")
def export_hf(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", help="Folder to make.")],
    dtype: Annotated[
        Literal["bf16", "fp32", "fp8_block", "fp8_tensor"],
        typer.Option("--dtype", help="fp8_block: DeepSeek's 128x128 blocks; fp8_tensor: one scale a matrix."),
    ] = "bf16",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest safetensors file.")
    ] = "5GB",
    check: _Check = None,
    text: _Text = None,
) -> int:
    """Write a checkpoint as a model of transformers: config.json, safetensors, tokenizer."""
    require_checkpoint(checkpoint)
    from fp8train.huggingface.exporting import export_command

    return export_command(
        checkpoint,
        output=output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        check=check,
        text=text,
    )
