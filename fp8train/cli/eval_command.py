"""``fp8train eval``: a checkpoint on a dataset, on text or on tasks, on one rank or several.

Every rank holds the whole model and takes whole batches in turn, so results do not depend on the number of
ranks (:mod:`fp8train.evaluation.scoring`, :func:`~fp8train.evaluation.perplexity.measure`). Rank 0 prints.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fp8train.comm.processes import Processes, processes
from fp8train.config.environment import world_from_environment
from fp8train.data.tokenizer import Tokenizer
from fp8train.evaluation.options import EvalOptions
from fp8train.evaluation.perplexity import Measurement, measure, open_text, relative_difference
from fp8train.evaluation.progress import Progress
from fp8train.evaluation.scoring import Request, Score, score
from fp8train.evaluation.tasks import DELIMITER, Encoded, Task, encode_task, read_task, task_metrics
from fp8train.evaluation.text import corpus_requests, read_corpus
from fp8train.evaluation.validation import evaluation_of
from fp8train.inference.errors import InferenceError
from fp8train.inference.load import TrainedRun, open_run
from fp8train.inference.weights import Numerics
from fp8train.live.console import format_count
from fp8train.models.build import BuiltModel
from fp8train.run_dir.metrics import strict
from fp8train.training.run import prepare_machine


def eval_command(checkpoint: Path, options: EvalOptions, *, device: str) -> int:
    """Print how well a checkpoint does.

    Args:
        checkpoint: step directory, or run directory for its newest good checkpoint.
        options: on what.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        Exit status 0.

    Raises:
        UserError: the checkpoint, the options or the files do not fit.
    """
    options.check()
    run = open_run(checkpoint)
    world = world_from_environment()
    prepare_machine(run.config, world.local_size)  # in one process: the threads, so the bits, of training
    with processes(device) as procs:
        shown = _Shown(world.rank == 0)
        if options.text:
            report = _on_text(run, options, procs, shown)
        elif options.tasks:
            report = _on_tasks(run, options, procs, shown)
        else:
            report = _on_dataset(run, options, procs, shown)
        if options.json_file is not None and world.rank == 0:
            _write_json(options.json_file, {"checkpoint": str(run.path), "step": run.step, **report})
    return 0


@dataclass(frozen=True)
class _Shown:
    """Prints on the first rank."""

    first: bool

    def head(self, text: str) -> None:
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        if self.first:
            print(text, flush=True)


def _on_dataset(run: TrainedRun, options: EvalOptions, procs: Processes, shown: _Shown) -> dict[str, Any]:
    text = open_text(
        run,
        options.split or "valid",
        num_batches=options.batches,
        prefix=options.prefix,
        batch_size=options.batch_size,
    )
    described = text.batches.samples.description
    shown.head(f"{run.path}: step {run.step}; {described}: {text.num_samples} samples")
    results = [
        measure(run, text, kind, device=procs.device, ranks=procs.dp) for kind in kinds(run, options.numerics)
    ]
    return {"text": described, "samples": text.num_samples, **_compared(results, shown)}


def _on_text(run: TrainedRun, options: EvalOptions, procs: Processes, shown: _Shown) -> dict[str, Any]:
    context, tokenizer = context_length(run, options.context), run.tokenizer()
    stride = options.stride or context
    if stride > context:
        raise InferenceError(f"--stride {stride} is more than the context of {context} tokens")
    corpus = read_corpus(options.text, tokenizer, json_key=options.json_key or "text")
    requests = corpus_requests(
        corpus,
        eod_id=tokenizer.eod_id,
        context_length=context,
        stride=stride,
        one_stream=options.one_stream,
    )
    documents, tokens = len(corpus.documents), sum(len(request.target) for request in requests)
    how = "one stream" if options.one_stream else "documents apart"
    shown.head(
        f"{run.path}: step {run.step}; {documents} documents, {tokens:,} tokens, {corpus.num_bytes:,} bytes; "
        f"{len(requests)} windows of {context} tokens, stride {stride}, {how}"
    )
    results = []
    for kind in kinds(run, options.numerics):
        scores, spent, operands = _scored(run, kind, requests, options, procs, tokenizer)
        nats = -math.fsum(one.log_prob for one in scores)
        results.append(Measurement(kind, operands, evaluation_of(nats, tokens, corpus.num_bytes), spent))
    return {
        "text": [str(file) for file in options.text],
        "documents": documents,
        "bytes": corpus.num_bytes,
        "windows": len(requests),
        "context": context,
        "stride": stride,
        "one_stream": options.one_stream,
        **_compared(results, shown),
    }


def _on_tasks(run: TrainedRun, options: EvalOptions, procs: Processes, shown: _Shown) -> dict[str, Any]:
    context, tokenizer = context_length(run, options.context), run.tokenizer()
    delimiter = DELIMITER if options.delimiter is None else options.delimiter
    tasks = [read_task(path, limit=options.limit) for path in options.tasks]
    encoded = [
        encode_task(task, tokenizer, delimiter=delimiter, context_length=context, apart=options.apart)
        for task in tasks
    ]
    counts = ", ".join(
        f"{task.path.name} {len(task.examples)} examples"
        + (f" ({one.truncated} contexts shortened)" if one.truncated else "")
        for task, one in zip(tasks, encoded, strict=True)
    )
    shown.head(f"{run.path}: step {run.step}; {counts}; context {context} tokens")
    results = []
    for kind in kinds(run, options.numerics):
        requests = [request for one in encoded for request in one.requests]
        scores, spent, operands = _scored(run, kind, requests, options, procs, tokenizer)
        rows = _task_rows(tasks, encoded, scores)
        for row in rows:
            shown.result(f"{kind:<7} | {_task_line(row)} | {operands}")
        results.append({"numerics": kind, "operands": operands, "seconds": spent, "tasks": rows})
    return {"context": context, "delimiter": delimiter, "apart": options.apart, "results": results}


def _task_rows(tasks: list[Task], encoded: list[Encoded], scores: list[Score]) -> list[dict[str, Any]]:
    rows, start = [], 0
    for task, one in zip(tasks, encoded, strict=True):
        metrics = task_metrics(task, scores[start : start + len(one.requests)])
        start += len(one.requests)
        rows.append(
            {
                "file": str(task.path),
                "kind": task.kind,
                "examples": len(task.examples),
                "truncated": one.truncated,
                **{name: strict(value) for name, value in metrics.items()},
            }
        )
    return rows


def _task_line(row: dict[str, Any]) -> str:
    parts = [f"{Path(row['file']).stem}"]
    for name in ("acc", "acc_norm"):
        if name in row:
            error = f" ± {row[f'{name}_stderr']:.4f}" if f"{name}_stderr" in row else ""
            parts.append(f"{name} {row[name]:.4f}{error}")
    if "perplexity" in row:
        parts.append(f"perplexity {row['perplexity']:.6g}")
    return " | ".join([*parts, f"{row['examples']} examples"])


def _scored(
    run: TrainedRun,
    kind: Numerics,
    requests: Sequence[Request],
    options: EvalOptions,
    procs: Processes,
    tokenizer: Tokenizer,
) -> tuple[list[Score], float, str]:
    """Scores, seconds without loading, and the operands in words."""
    built: BuiltModel = run.load(kind, device=procs.device)
    batch_size = options.batch_size or run.config.train.micro_batch_size
    mine = len(range(procs.rank, -(-len(requests) // batch_size), procs.world_size))
    progress = Progress(kind, mine, quiet=procs.rank > 0)
    advance: Callable[[int], None] = progress.advance
    began = time.perf_counter()
    scores = score(
        built.model,
        requests,
        batch_size=batch_size,
        pad_id=tokenizer.eod_id,
        ranks=procs.dp,
        advance=advance,
    )
    return scores, time.perf_counter() - began, run.describe(kind, built)


def context_length(run: TrainedRun, wanted: int | None) -> int:
    """Tokens that the model reads at once: ``wanted``, or all its positions.

    Raises:
        InferenceError: more than it has positions.
    """
    longest = run.config.model.max_seq_len
    if wanted is not None and wanted > longest:
        raise InferenceError(
            f"--context {wanted} is more than the model's context (model.max_seq_len: {longest})"
        )
    return wanted or longest


def kinds(run: TrainedRun, numerics: Numerics | Literal["both"]) -> list[Numerics]:
    """What to measure: a run whose own numerics are BF16 is measured once."""
    if numerics != "both":
        return [numerics]
    is_bf16 = not run.config.precision.gemm.fp8 and run.config.precision.compute == "bf16"
    return ["matched"] if is_bf16 else ["matched", "bf16"]


def _compared(results: list[Measurement], shown: _Shown) -> dict[str, Any]:
    """Print results; their part of the report."""
    for result in results:
        shown.result(_line(result))
    difference = relative_difference(*results) if len(results) > 1 else None
    if difference is not None:
        shown.result(
            f"perplexity, {results[0].numerics} against {results[1].numerics}: {100 * difference:+.4f} %"
        )
    return {
        "results": [result.plain() for result in results],
        "relative_difference": None if difference is None else strict(difference),
    }


def _write_json(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise InferenceError(f"--json {path}: {error.strerror or error}") from None


def _line(result: Measurement) -> str:
    evaluation = result.evaluation
    parts = [f"loss {evaluation.loss:.6f} nats/token", f"perplexity {result.perplexity:.6g}"]
    if evaluation.bits_per_byte is not None:
        parts.append(f"{evaluation.bits_per_byte:.4f} bits/byte")
    speed = format_count(evaluation.tokens / result.seconds)
    parts += [f"{evaluation.tokens:,} tokens", f"{speed} tokens/s", result.operands]
    return f"{result.numerics:<7} | " + " | ".join(parts)
