"""The ``fp8train`` command.

Every command imports what it needs when it runs, so that ``fp8train config`` answers in a fraction of a
second and needs no torch. What a user can mend (:class:`~fp8train.config.errors.UserError`, a wrong option)
ends with its message on stderr and exit status 2; Ctrl-C with 130; anything else is a bug and keeps its
traceback. Under torchrun only rank 0 prints, every rank exits with the status, and failures are also left
where torchrun looks for them, so that its own summary names the reason.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fp8train.config.errors import UserError

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""

_Options = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, laid over the file in order", show_default=False),
]
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError: newer typer ships click privately

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


class TokenizerKind(StrEnum):
    """What ``--train-tokenizer`` takes."""

    unigram = "unigram"
    bpe = "bpe"


class Device(StrEnum):
    """What ``--device`` takes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Numerics(StrEnum):
    """What ``--numerics`` of ``generate`` takes."""

    matched = "matched"
    bf16 = "bf16"


class EvalNumerics(StrEnum):
    """What ``--numerics`` of ``eval`` takes."""

    matched = "matched"
    bf16 = "bf16"
    both = "both"


class States(StrEnum):
    """What ``--states`` takes."""

    fp32 = "fp32"


class Split(StrEnum):
    """What ``--split`` takes."""

    train = "train"
    valid = "valid"
    test = "test"


class ExportType(StrEnum):
    """What ``--dtype`` takes."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp8_block = "fp8_block"
    fp8_tensor = "fp8_tensor"


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


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: _Options = None,
) -> int:
    """Train. Use torchrun for more than one process: torchrun --nproc-per-node=8 -m fp8train train CONFIG."""
    from fp8train.config.resolve import load_config

    resolved = load_config(config, overrides or ())  # before torch is imported: a typo is reported at once
    from fp8train.training.run import run

    return run(resolved)


@app.command(name="config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run", show_default=False)] = None,
    overrides: _Options = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the resolved config as YAML.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema for editors.")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Print all keys as Markdown.")] = False,
    recipe: Annotated[
        bool,
        typer.Option("--recipe", help="Print formats, scales, multipliers and rates of every layer."),
    ] = False,
) -> None:
    """Print every value of a run and where it came from."""
    if sum((yaml, schema, reference, recipe)) > 1:
        raise UserError("--yaml, --schema, --reference and --recipe exclude each other")
    if schema or reference:
        if config is not None:
            raise UserError("--schema and --reference describe every config; leave out CONFIG")
        from fp8train.config.editor_schema import dump_editor_schema
        from fp8train.config.explain import reference as markdown_reference

        _write(dump_editor_schema() if schema else markdown_reference())
        return
    if config is None:
        raise UserError("name a config file, or ask for --schema or --reference")
    from fp8train.config.dump import dump_yaml
    from fp8train.config.explain import explain
    from fp8train.config.resolve import load_config

    resolved = load_config(config, overrides or ())
    if recipe:
        from fp8train.planning.recipe_table import describe_recipe

        _write(describe_recipe(resolved.config))
        return
    _write(dump_yaml(resolved.config) if yaml else explain(resolved))


@data_app.command()
def prepare(
    output: Annotated[str, typer.Option("--output", help="Path of the dataset without .bin/.idx.")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(help="Text files, .jsonl files, folders", show_default=False)
    ] = None,
    stdlib: Annotated[
        bool, typer.Option("--stdlib", help="Add the source of Python's standard library.")
    ] = False,
    glob: Annotated[
        list[str] | None,
        typer.Option("--glob", help="Files to take from folders; default *.txt and *.jsonl."),
    ] = None,
    json_key: Annotated[str, typer.Option("--json-key", help="Key of the text in .jsonl records.")] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Existing tokenizer file or folder.")
    ] = None,
    train_tokenizer: Annotated[
        TokenizerKind | None,
        typer.Option("--train-tokenizer", help="Train a tokenizer on the text; default bpe."),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", min=2, help="Vocabulary of the trained tokenizer; default 8192."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; default: usable cores.")
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="Write documents in a seeded random order.")] = True,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the shuffle and the tokenizer's sample.")
    ] = 1234,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
) -> None:
    """Turn text into a dataset: OUTPUT.bin, OUTPUT.idx and the tokenizer beside them."""
    from fp8train.data.prepare import prepare as prepare_dataset
    from fp8train.data.sources import DEFAULT_PATTERNS, stdlib_corpus

    given: list[str | Path] = [*(inputs or ()), *(stdlib_corpus() if stdlib else ())]
    if not given:
        raise UserError("name text files or folders, or give --stdlib")
    sidecar = prepare_dataset(
        given,
        output,
        tokenizer=tokenizer,
        model_type=train_tokenizer.value if train_tokenizer else None,
        vocab_size=vocab_size,
        patterns=tuple(glob) if glob else DEFAULT_PATTERNS,
        text_key=json_key,
        workers=workers,
        shuffle=shuffle,
        seed=seed,
        overwrite=overwrite,
    )
    counts = f"{sidecar.documents} documents, {sidecar.tokens} tokens, {sidecar.source_bytes} bytes of text"
    report = "".join(f"  {reason}: {count}\n" for reason, count in sidecar.report.items())
    _write(f"{output}: {counts}\n{report}")


@data_app.command(name="prepare-sft")
def prepare_conversations(
    inputs: Annotated[
        list[Path], typer.Argument(help=".jsonl of {prompt, response} or {messages: [{role, content}, ..]}")
    ],
    output: Annotated[str, typer.Option("--output", help="Path of the dataset without .bin/.idx.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="The model's tokenizer file or folder.")],
    shuffle: Annotated[bool, typer.Option(help="Write conversations in a seeded random order.")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the shuffle.")] = 1234,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
) -> None:
    """Turn conversations into a dataset of which the answers are learnt (data.kind: sft)."""
    from fp8train.data.prepare_sft import prepare_sft

    sidecar = prepare_sft(
        inputs, output, tokenizer=tokenizer, shuffle=shuffle, seed=seed, overwrite=overwrite
    )
    assert sidecar.mask is not None
    counts = f"{sidecar.documents} conversations, {sidecar.tokens} tokens, {sidecar.mask.targets} targets"
    report = "".join(f"  {reason}: {count}\n" for reason, count in sidecar.report.items())
    _write(f"{output}: {counts}\n{report}")


@data_app.command()
def inspect(
    prefix: Annotated[str, typer.Argument(help="Path of the dataset without .bin/.idx")],
    documents: Annotated[int, typer.Option("--documents", min=0, help="How many documents to show.")] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to show of each.")] = 60,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Tokenizer file; default: the one beside the dataset.")
    ] = None,
    scan: Annotated[bool, typer.Option("--scan", help="Check every token against the vocabulary.")] = False,
) -> None:
    """Describe a dataset and decode its first documents."""
    from fp8train.data.inspection import inspect_dataset

    _write(
        inspect_dataset(prefix, documents=documents, max_tokens=max_tokens, tokenizer=tokenizer, scan=scan)
        + "\n"
    )


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or run directory for its newest one")
    ],
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
        Numerics, typer.Option("--numerics", help="matched: as trained, in FP8 if it was; bf16: no FP8.")
    ] = Numerics.matched,
    device: Annotated[
        Device, typer.Option("--device", help="auto takes CUDA where a device is visible.")
    ] = Device.auto,
) -> int:
    """Continue a text with a trained model."""
    from fp8train.inference.generate import generate_command

    return generate_command(
        checkpoint,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        num_samples=num_samples,
        device=device.value,
        numerics=numerics.value,
    )


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or run directory for its newest one")
    ],
    numerics: Annotated[
        EvalNumerics, typer.Option("--numerics", help="matched: as trained; bf16: no FP8; both: compare.")
    ] = EvalNumerics.both,
    split: Annotated[
        Split | None, typer.Option("--split", help="Part of the run's data; default valid.")
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
    device: Annotated[
        Device, typer.Option("--device", help="auto takes CUDA where a device is visible.")
    ] = Device.auto,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the unrounded results here too.")
    ] = None,
) -> int:
    """Measure a trained model, as trained and in BF16: on its dataset, on text or on tasks.

    Under torchrun the ranks share the work.
    """
    from fp8train.training.eval_command import EvalOptions, eval_command

    options = EvalOptions(
        numerics=numerics.value,
        batch_size=batch_size,
        split=None if split is None else split.value,
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
    )
    return eval_command(checkpoint, options, device=device.value, json_file=json_file)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint, checkpoints directory or run directory")],
) -> int:
    """Check checkpoints completely; one line for each, exit status 0 or 2."""
    from fp8train.checkpoint.examine import verify_command

    return verify_command(path)


@export_app.command()
def states(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or run directory for its newest one")
    ],
    output: Annotated[Path, typer.Option("--output", help="NAME.safetensors")],
    states: Annotated[
        States, typer.Option("--states", help="fp32: decode all states to FP32.")
    ] = States.fp32,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Of one file; more than that is split.")
    ] = "5GB",
) -> None:
    """Write master weights and moments as plain numbers, in safetensors."""
    from fp8train.checkpoint.safetensors_files import parse_size
    from fp8train.inference.export_states import export_states

    assert states == States.fp32
    _write(export_states(checkpoint, output, max_shard_bytes=parse_size(max_shard_size)) + "\n")


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
    from fp8train.huggingface.importing import import_command

    return import_command(folder, output=output, check=check, text=text)


@export_app.command(name="hf")
def export_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or run directory for its newest one")
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder to make.")],
    dtype: Annotated[
        ExportType,
        typer.Option("--dtype", help="fp8_block: DeepSeek's 128x128 blocks; fp8_tensor: one scale a matrix."),
    ] = ExportType.bf16,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest safetensors file.")
    ] = "5GB",
    check: _Check = None,
    text: _Text = None,
) -> int:
    """Write a checkpoint as a model of transformers: config.json, safetensors, tokenizer."""
    from fp8train.huggingface.exporting import export_command

    return export_command(
        checkpoint,
        output=output,
        dtype=dtype.value,
        max_shard_size=max_shard_size,
        check=check,
        text=text,
    )


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


@app.command()
def doctor() -> int:
    """Report what this machine can run, and why not."""
    from fp8train.training.doctor import doctor as examine

    return examine()


def _write(text: str) -> None:
    """Print now, so that a closed pipe (``| head``) is noticed inside the command and ends it quietly."""
    sys.stdout.write(text)
    sys.stdout.flush()


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
        print(message, file=sys.stderr, flush=True)


def _recorded(function: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int | None]:
    """``function``, its uncaught exceptions also written where torchrun collects them."""
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a run
    run: Callable[[Sequence[str]], int | None] = run_command
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run = _recorded(run_command)
    status = run(sys.argv[1:])
    # Process groups sit in reference cycles (hooks, stores), and only their destruction joins gloo's threads.
    # One that is still at work while the interpreter is torn down aborts a process that has done its job.
    gc.collect()
    sys.exit(status)
