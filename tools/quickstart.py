"""The quick start: text in, trained models out, BF16 beside FP8 from GEMMs to optimizer, on any machine.

Source code of Python's standard library -> SentencePiece tokenizer -> Megatron dataset -> the same small
Llama four times, from the same weights on the same batches: in BF16 (level O0), with FP8 GEMMs alone, at O1
and at O2 -> validation losses against a bigram model counted on the same training tokens, bytes per
parameter, bytes on the wire (counted in two more steps of each, on two processes), what ran in FP8, a loss
plot, checkpoints, and a few generated lines. Everything is measured in this run. The limits at the end are
checked, and the exit status tells: 0 all hold, 1 one does not. docs/quickstart.md explains the output.

    python tools/quickstart.py [--out runs/quickstart] [--data data/quickstart] [--vocab-size 4096]
    [--jobs 2] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules beside it only

from fp8train.config.resolve import load_config  # noqa: E402
from fp8train.data.prepare import prepare  # noqa: E402
from fp8train.data.sources import stdlib_corpus  # noqa: E402
from tools.quickstart_report import (  # noqa: E402
    Result,
    bigram_loss,
    limits,
    losses_table,
    plot_losses,
    summary,
)

LLAMA = "configs/quickstart/llama.yaml"
RUNS: dict[str, tuple[str, list[str]]] = {
    "BF16": (LLAMA, []),
    "FP8 GEMMs": ("configs/quickstart/llama_fp8.yaml", []),
    "O1": (LLAMA, ["precision.level=O1", "run.name=llama_o1"]),
    "O2": (LLAMA, ["precision.level=O2", "run.name=llama_o2"]),
}
WIDTH = max(map(len, RUNS))
STAGES = 4
MAX_BITS_PER_BYTE = 1.95
MAX_GAP = 0.05
PROMPT = "def __init__(self"
MAX_NEW_TOKENS = 100
SAMPLING = ("--temperature", "0.5", "--top-k", "40", "--seed", "1")


def main() -> int:
    """Run everything; returns the exit status."""
    args = parse_arguments()
    os.chdir(ROOT)  # so that every path printed is relative to the project
    console = Console(width=110, highlight=False, soft_wrap=True)
    began = time.perf_counter()
    stage(console, 1, "text -> tokenizer -> dataset")
    make_dataset(console, args.data / "stdlib", args.vocab_size)
    together = f", {args.jobs} at a time" if args.jobs > 1 else ""
    stage(console, 2, f"train the same Llama {len(RUNS)} times{together}")
    settings = {name: [*shared_settings(args), *own, *args.overrides] for name, (_, own) in RUNS.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        trained = list(pool.map(lambda name: train(name, settings[name]), RUNS))
    sent = sent_bytes(settings)
    results = [replace(result, sent=sent[result.name]) for result in trained]
    stage(console, 3, "compare")
    resolved = load_config(LLAMA, settings["BF16"])
    bigram = bigram_loss(resolved)
    plot = args.out / "loss.png"
    plot_losses(results, bigram, limit=MAX_GAP, path=plot)
    console.print(losses_table(results, bigram))
    console.print(f"plot of the losses  {plot}\nrun directories     {results[0].directory} and beside it")
    stage(console, STAGES, f"generate from the {results[-1].name} model, prompt {PROMPT!r}")
    console.print(generate(results[-1], resolved.config.model.max_seq_len), markup=False)
    console.print("\n== summary")
    for name, text in summary(results, bigram, took=time_taken(began)):
        console.print(f"{name:<{WIDTH}}  {text}", markup=False)
    console.print()
    checks = limits(results, bigram, max_gap=MAX_GAP, max_bits_per_byte=MAX_BITS_PER_BYTE)
    for text, holds in checks:
        console.print(f"{'ok' if holds else 'FAIL':<{WIDTH}}  {text}", markup=False)
    return 0 if all(holds for _, holds in checks) else 1


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="where runs and the plot go"
    )
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="where the dataset goes")
    parser.add_argument("--vocab-size", type=int, default=4096)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=min(2, cores), help="runs at a time")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all runs")
    return parser.parse_args()


def shared_settings(args: argparse.Namespace) -> list[str]:
    """Where data and runs lie, as overrides."""
    return [f"data.prefix={args.data / 'stdlib'}", f"run.dir={args.out}"]


def stage(console: Console, number: int, what: str) -> None:
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


def train(name: str, overrides: list[str]) -> Result:
    """Train one run with the command line a user would type, and read its records.

    Its evaluations are shown behind the run's name; all that it prints is in ``logs/console.log`` of its run
    directory.

    Raises:
        SystemExit: it failed; the end of its output is shown then.
    """
    config = RUNS[name][0]
    say(name, f"$ fp8train train {config} {' '.join(o for o in overrides if o.startswith('precision.'))}")
    resolved = load_config(config, overrides).config
    directory = Path(resolved.run.dir) / resolved.run.name
    command = [sys.executable, "-m", "fp8train", "train", config, "run.overwrite=true", *overrides]
    lines = []
    with subprocess.Popen(
        command, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if re.match(r"step \d+: validation loss", line):
                say(name, line)
        _, status, used = os.wait4(process.pid, 0)  # of this process alone, which Popen does not tell
        process.returncode = os.waitstatus_to_exitcode(status)
    if (directory / "logs").is_dir():
        (directory / "logs" / "console.log").write_text("".join(lines))
    if process.returncode:
        raise SystemExit(f"{name} failed with status {process.returncode}:\n{''.join(lines[-20:])}")
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in metrics if "eval/loss" in record][-1]
    seconds = used.ru_utime + used.ru_stime
    return Result(name, directory, last["eval/loss"], last["eval/bits_per_byte"], seconds, metrics)


def say(name: str, text: str) -> None:
    """A line of a run, in one piece: another run may print too."""
    print(f"{name:<{WIDTH}}  {text.strip()}\n", end="", flush=True)


def one_thread() -> dict[str, str]:
    """The environment of a process that shares the machine with its like."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def sent_bytes(settings: dict[str, list[str]]) -> dict[str, float]:
    """By run: what one of two data-parallel ranks sends a step for gradients, per parameter."""
    runs = {name: [RUNS[name][0], *overrides] for name, overrides in settings.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tools/quickstart_wire.py", json.dumps(runs)]
    environment = one_thread() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"counting bytes on the wire failed:\n{done.stderr[-4000:]}")
    sent: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sent


def generate(result: Result, context: int) -> str:
    """Sample from a run's newest checkpoint with the command line a user would type."""
    command = [sys.executable, "-m", "fp8train", "generate", str(result.checkpoint), "--prompt", PROMPT]
    command += ["--max-tokens", str(min(MAX_NEW_TOKENS, context // 2)), *SAMPLING]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.rstrip()


def time_taken(began: float) -> str:
    """Since ``began``, of all processes."""
    used = sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    minutes, cores = (time.perf_counter() - began) / 60, len(os.sched_getaffinity(0))
    return f"{minutes:.1f} minutes, {used:.0f} CPU seconds, on {cores} CPU core{'s' * (cores > 1)}"


if __name__ == "__main__":
    raise SystemExit(main())
