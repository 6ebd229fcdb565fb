"""The quick start: text in, trained models out, BF16 beside FP8 from GEMMs to optimizer, on any machine.

Source code of Python's standard library -> SentencePiece tokenizer -> Megatron dataset -> the same small
Llama four times, from the same weights on the same batches: in BF16 (level O0), with FP8 GEMMs alone, at O1
and at O2 -> validation losses against a bigram model counted on the same training tokens, bytes per
parameter, bytes on the wire (counted in two more steps of each, on two processes), what ran in FP8, a loss
plot, checkpoints, and a few generated lines. Everything is measured in this run. The limits at the end are
checked, and the exit status tells: 0 all hold, 1 one does not.

    python tools/quickstart.py [--out runs/quickstart] [--data data/quickstart] [--vocab-size 12288]
    [--jobs 2] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from fp8train.config.resolve import ResolvedConfig, load_config
from fp8train.data.loading import open_data
from fp8train.data.prepare import prepare
from fp8train.data.sources import stdlib_corpus

ROOT = Path(__file__).resolve().parent.parent
LLAMA = Path("configs/quickstart/llama.yaml")
RUNS: dict[str, tuple[Path, list[str]]] = {
    "BF16": (LLAMA, []),
    "FP8 GEMMs": (Path("configs/quickstart/llama_fp8.yaml"), []),
    "O1": (LLAMA, ["precision.level=O1", "run.name=quickstart_llama_o1"]),
    "O2": (LLAMA, ["precision.level=O2", "run.name=quickstart_llama_o2"]),
}
STAGES = 4
WIRE_STEPS = 2
MAX_BITS_PER_BYTE = 2.3
MAX_GAP = 0.05
PROMPT = "def __init__(self"


@dataclass(frozen=True)
class Result:
    """What one run left behind."""

    name: str
    directory: Path
    loss: float
    bits_per_byte: float
    seconds: float
    metrics: list[dict[str, Any]]


def main() -> int:
    """Run everything; returns the exit status."""
    args = parse_arguments()
    os.chdir(ROOT)  # so that every path printed is relative to the project
    console = Console(width=110, highlight=False, soft_wrap=True)
    began = time.perf_counter()
    prefix = args.data / "stdlib"
    step(console, 1, "text -> tokenizer -> dataset")
    make_dataset(console, prefix, args.vocab_size)
    step(console, 2, f"train {', '.join(RUNS)}" + (f", {args.jobs} at a time" if args.jobs > 1 else ""))
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda name: train(name, settings(prefix, args, RUNS[name][1])), RUNS))
        wire = list(pool.map(lambda name: sent_bytes(name, settings(prefix, args, RUNS[name][1])), RUNS))
    resolved = load_config(LLAMA, settings(prefix, args, []))
    step(console, STAGES - 1, "compare")
    bigram = bigram_loss(resolved, prefix)
    plot = plot_losses(results, bigram, args.out / "loss.png")
    console.print(losses_table(results, wire, bigram))
    report_casts(console, results[-1])
    console.print(f"loss plot    {plot}")
    for result in results:
        console.print(f"checkpoint   {newest_checkpoint(result.directory)}")
    step(console, STAGES, f"generate from the {results[-1].name} model, prompt {PROMPT!r}")
    console.print(generate(results[-1].directory), markup=False)
    status = verdict(console, results, bigram)
    console.print(f"\nfinished in {(time.perf_counter() - began) / 60:.1f} minutes")
    return status


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="where runs and the plot go"
    )
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="where the dataset goes")
    parser.add_argument("--vocab-size", type=int, default=12288)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=min(2, cores), help="runs at a time")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all runs")
    return parser.parse_args()


def step(console: Console, number: int, what: str) -> None:
    """Announce a stage."""
    console.print(f"\n== {number}/{STAGES}  {what}", markup=False)


def make_dataset(console: Console, prefix: Path, vocab_size: int) -> None:
    """Tokenise the standard library unless an earlier call has."""
    if Path(f"{prefix}.idx").exists():
        console.print(f"dataset {prefix} exists; delete {prefix.parent} to make it anew")
        return
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sidecar = prepare(stdlib_corpus(), str(prefix), vocab_size=vocab_size, patterns=("*.py",))
    console.print(
        f"{sidecar.documents} files, {sidecar.source_bytes / 1e6:.1f} MB -> {sidecar.tokens:,} tokens of a "
        f"{sidecar.vocab_size}-piece vocabulary ({sidecar.source_bytes / sidecar.tokens:.2f} bytes per token)"
    )


def settings(prefix: Path, args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The overrides of a run: its own, what all share, and the user's."""
    return [f"data.prefix={prefix}", f"run.dir={args.out}", *overrides, *args.overrides]


def launch(name: str, ranks: int, overrides: list[str], *, show: bool) -> None:
    """Run ``fp8train train`` to its end; its lines are shown behind the run's name.

    Raises:
        SystemExit: it failed; its output is shown then.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "fp8train", "train"]
    command += [str(RUNS[name][0]), "run.overwrite=true", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if show:
                print(f"{name:<{max(map(len, RUNS))}}  {line}", end="", flush=True)
    if process.returncode:
        raise SystemExit(f"{name} failed with status {process.returncode}:\n{''.join(lines[-20:])}")


def train(name: str, overrides: list[str]) -> Result:
    """Train one run with the command line a user would type, and read its records."""
    config = RUNS[name][0]
    level = " ".join(override for override in overrides if override.startswith("precision."))
    line = f"{name:<{max(map(len, RUNS))}}  $ fp8train train {config} {level}".rstrip()
    print(f"{line}\n", end="", flush=True)  # in one piece: another run may print too
    began = time.perf_counter()
    launch(name, 1, overrides, show=True)
    seconds = time.perf_counter() - began
    resolved = load_config(config, overrides)
    directory = Path(resolved.config.run.dir) / resolved.config.run.name
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in metrics if "eval/loss" in record][-1]
    return Result(name, directory, last["eval/loss"], last["eval/bits_per_byte"], seconds, metrics)


def bigram_loss(resolved: ResolvedConfig, prefix: Path) -> float:
    """Nats per token of an interpolated bigram model, counted on the training tokens that the runs saw.

    ``p(b | a) = w·count(a, b)/count(a) + (1 - w)·(count(b) + 1)/(total + V)``; the weight w is the best of a
    grid *on the validation text*, which flatters the bigram.
    """
    config = resolved.config
    data = open_data(
        config.data,
        vocab_size=None,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=config.run.seed,
        total_steps=config.total_steps,
    )
    assert data.valid is not None
    size = data.vocab_size
    seen = np.stack([data.train.batch(s).numpy() for s in range(config.total_steps)]).reshape(
        -1, config.data.seq_length + 1
    )
    num_valid = min(config.train.eval_batches, data.valid.batches_per_epoch)
    valid = np.stack([data.valid.batch(s).numpy() for s in range(num_valid)]).reshape(
        -1, config.data.seq_length + 1
    )
    pairs, counts = np.unique(seen[:, :-1].ravel() * size + seen[:, 1:].ravel(), return_counts=True)
    before = np.bincount(seen[:, :-1].ravel(), minlength=size)
    unigram = (np.bincount(seen[:, 1:].ravel(), minlength=size) + 1) / (seen[:, 1:].size + size)
    first, second = valid[:, :-1].ravel(), valid[:, 1:].ravel()
    keys = first * size + second
    place = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
    together = np.where(pairs[place] == keys, counts[place], 0)
    conditional = together / np.maximum(before[first], 1)
    return min(
        float(-np.log(w * conditional + (1 - w) * unigram[second]).mean())
        for w in np.linspace(0.05, 0.95, 19)
    )


def losses_table(results: list[Result], wire: list[float], bigram: float) -> Table:
    """Validation losses side by side, with bytes per parameter of the hidden linears."""
    table = Table(
        title="validation after training on the same batches; bytes per parameter of the hidden linears"
    )
    for heading in (
        *("run", "nats/token", "bits/byte", "gap to BF16", "in FP8"),
        *("stored", "sent a step", "seconds"),
    ):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    bytes_per_token = results[0].loss / math.log(2) / results[0].bits_per_byte
    table.add_row("bigram", f"{bigram:.4f}", f"{bigram / math.log(2) / bytes_per_token:.3f}", *[""] * 5)
    for result, sent in zip(results, wire, strict=True):
        gap = "" if result is results[0] else f"{result.loss - results[0].loss:+.4f}"
        linears = fp8_linears(result)
        table.add_row(
            result.name,
            f"{result.loss:.4f}",
            f"{result.bits_per_byte:.3f}",
            gap,
            linears,
            stored_bytes(result),
            f"{sent:.2f}",
            f"{result.seconds:.0f}",
        )
    return table


def events(result: Result, kind: str) -> list[dict[str, Any]]:
    """Records of a run's events.jsonl."""
    lines = (result.directory / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def fp8_linears(result: Result) -> str:
    """``8 of 8`` hidden linears, as the run recorded it."""
    plan = events(result, "model")[-1]
    return f"{plan['fp8_linears']} of {plan['hidden_linears']}"


def stored_bytes(result: Result) -> str:
    """Gradient and optimizer states, and the weight as GEMMs read it, of the hidden linears."""
    shares = events(result, "model")[-1]["bytes_per_parameter"]
    return f"{shares['total']:.2f} + {shares['compute_copy']:.2f}"


def sent_bytes(name: str, overrides: list[str]) -> float:
    """What one of two data-parallel ranks sends a step for gradients of the hidden linears, per parameter, as
    counted by its collectives in a run of :data:`WIRE_STEPS` steps."""
    short = [f"train.steps={WIRE_STEPS}", "train.micro_batch_size=1", "train.eval_interval=0"]
    short += ["logging.tensorboard=false", "checkpoint.save_at_end=false"]
    with tempfile.TemporaryDirectory() as folder:
        launch(name, 2, [*overrides, *short, f"run.dir={folder}", "run.name=wire"], show=False)
        directory = Path(folder) / "wire"
        last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
        model = next(
            record
            for record in map(json.loads, (directory / "events.jsonl").read_text().splitlines())
            if record["kind"] == "model"
        )
    sent: Counter[str] = Counter()
    for key, value in last.items():
        if key.startswith("comm/sent_bytes/"):
            sent[key.rpartition("/")[2]] += value
    purpose, count = "gradient", model["parameters"]
    if "gradient_fp8_plan" in sent:  # else hidden linears travel with all others
        purpose, count = "gradient_fp8_plan", model["hidden_parameters"]
    return sent[purpose] / WIRE_STEPS / count


def report_casts(console: Console, result: Result) -> None:
    """Cast statistics of the last sampled step, by operand."""
    rows = [json.loads(line) for line in (result.directory / "casts.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    table = Table(title=f"FP8 casts of step {rows[-1]['step']} ({len(last)} cast sites)")
    for heading in (
        "operand",
        "format",
        "sites",
        "SNR dB (lowest)",
        "SNR dB (median)",
        "flushed % (worst)",
        "saturated %",
    ):
        table.add_column(heading, justify="left" if heading in ("operand", "format") else "right")
    for operand, fmt in (("x", "E4M3"), ("w", "E4M3"), ("grad_output", "E5M2"), ("grad_weight", "E4M3")):
        chosen = [row for row in last if row["site"].endswith("/" + operand)]
        snr = sorted(row["snr_db"] for row in chosen)
        table.add_row(
            operand,
            fmt,
            str(len(chosen)),
            f"{snr[0]:.1f}",
            f"{snr[len(snr) // 2]:.1f}",
            f"{100 * max(row['flushed'] for row in chosen):.3f}",
            f"{100 * max(row['saturated'] for row in chosen):.3f}",
        )
    console.print(table)


def plot_losses(results: list[Result], bigram: float, path: Path) -> Path:
    """Training and validation losses of all runs as a PNG."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for result, style in zip(results, ("-", "--", "-.", ":"), strict=True):
        train = [(r["step"], r["train/loss"]) for r in result.metrics if "train/loss" in r]
        valid = [(r["step"], r["eval/loss"]) for r in result.metrics if "eval/loss" in r]
        (line,) = axes.plot(*zip(*train, strict=True), style, linewidth=1, label=f"{result.name}, training")
        axes.plot(*zip(*valid, strict=True), "o", color=line.get_color(), label=f"{result.name}, validation")
    axes.axhline(bigram, color="grey", linewidth=0.8, linestyle=":", label="bigram counts, validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path


def newest_checkpoint(directory: Path) -> Path:
    """The last checkpoint of a run."""
    return max((directory / "checkpoints").glob("step_????????"))


def generate(directory: Path) -> str:
    """Sample from a run's newest checkpoint with the command line a user would type."""
    command = [
        sys.executable,
        "-m",
        "fp8train",
        "generate",
        str(newest_checkpoint(directory)),
        "--prompt",
        PROMPT,
    ]
    command += ["--max-tokens", "120", "--temperature", "0.7", "--top-p", "0.9", "--seed", "2"]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.rstrip()


def verdict(console: Console, results: list[Result], bigram: float) -> int:
    """Check the limits and say so; 0 if all hold."""
    gap = max(abs(result.loss - results[0].loss) for result in results[1:])
    plans = [events(result, "model")[-1] for result in results[1:]]
    checks = [
        (f"bits per byte <= {MAX_BITS_PER_BYTE}", max(r.bits_per_byte for r in results) <= MAX_BITS_PER_BYTE),
        (f"below the bigram model ({bigram:.4f})", max(r.loss for r in results) < bigram),
        (f"FP8 within {MAX_GAP} nats of BF16 ({gap:.4f})", gap <= MAX_GAP),
        (
            "every hidden linear ran in FP8",
            all(plan["fp8_linears"] == plan["hidden_linears"] for plan in plans),
        ),
    ]
    console.print()
    for text, holds in checks:
        console.print(f"{'ok  ' if holds else 'FAIL'} {text}", markup=False)
    return 0 if all(holds for _, holds in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
