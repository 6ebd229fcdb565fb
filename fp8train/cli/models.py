"""Commands that use a trained model: generate, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8train.cli.app import Checkpoint, Device, app, require_checkpoint


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Sample from the k likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")] = 1234,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Continuations to print.")] = 1,
    numerics: Annotated[
        Literal["matched", "bf16"],
        typer.Option("--numerics", help="matched: as trained, in FP8 if it was; bf16: no FP8."),
    ] = "matched",
    device: Device = "auto",
) -> int:
    """Continue a text with a trained model."""
    require_checkpoint(checkpoint)
    from fp8train.inference.generate import generate_command
    from fp8train.inference.sampling import Sampling

    return generate_command(
        checkpoint,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        num_samples=num_samples,
        device=device,
        numerics=numerics,
    )


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint,
    numerics: Annotated[
        Literal["matched", "bf16", "both"],
        typer.Option("--numerics", help="matched: as trained; bf16: no FP8; both: compare."),
    ] = "both",
    split: Annotated[
        Literal["train", "valid", "test"] | None,
        typer.Option("--split", help="Part of the run's data; default valid."),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(
            "--batches",
            min=1,
            help="Batches of train.global_batch_size samples; default: train.eval_batches.",
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="Read this dataset, without .bin/.idx, not the run's.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Perplexity of this text instead, .jsonl: of its documents; repeatable."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, help="With --text: new tokens per window; default: the context."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="With --text: documents end to end, not each by itself.")
    ] = False,
    json_key: Annotated[
        str | None, typer.Option("--json-key", help="With --text: key of .jsonl records; default text.")
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option("--tasks", help="Accuracy on this .jsonl: multiple choice or last words; repeatable."),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="With --tasks: joins query and choice; default a space.")
    ] = None,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="With --tasks: tokenise query and choice apart, as prepare-sft does."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="With --tasks: the first examples of each file.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens read at once; default: model.max_seq_len."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Sequences per forward; default: train.micro_batch_size."),
    ] = None,
    device: Device = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the unrounded results here too.")
    ] = None,
) -> int:
    """Measure a trained model, as trained and in BF16: on its dataset, on text or on tasks.

    Under torchrun the ranks share the work.
    """
    from fp8train.evaluation.options import EvalOptions

    options = EvalOptions(
        numerics=numerics,
        batch_size=batch_size,
        split=split,
        batches=batches,
        prefix=prefix,
        text=text or (),
        stride=stride,
        one_stream=stream,
        json_key=json_key,
        tasks=tasks or (),
        delimiter=delimiter,
        apart=apart,
        limit=limit,
        context=context,
        json_file=json_file,
    )
    options.check()
    require_checkpoint(checkpoint)
    from fp8train.cli.eval_command import eval_command

    return eval_command(checkpoint, options, device=device)
