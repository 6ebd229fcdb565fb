"""Tokens per second, peak memory and MFU of a training step: BF16 GEMMs beside FP8 GEMMs, any configuration.

    python tools/bench/train_step.py --config configs/llama/llama3_8b.yaml --layers 4 --seq 4096
    python tools/bench/train_step.py --tiny

The step is the one that ``fp8train train`` runs (forward, loss, backward, gradient store, clipping, AdamW
with FP32 masters), on random tokens: no dataset is opened. ``--layers`` cuts the model to what a card holds.
Embedding and head are not cut, so few layers of a large vocabulary understate what FP8 gains.

* Speed: variants run alternately in this process; ratios are taken round by round.
* Memory, CUDA: the allocator's peak over the warm-up, less what earlier variants hold.
* Memory, CPU: peak resident size of a forked process that runs the warm-up, torch's own 300 MB included.
* TFLOP/s and MFU: :mod:`fp8train.live.throughput`. A token takes ``6 · matmul parameters
  + 6 · layers · heads · head_dim · sequence`` FLOPs: forward 2 for each weight, and in attention
  2·2·S·head_dim for each head (scores, then values), of which the causal mask leaves half; backward twice the
  forward. BF16 is held against the BF16 peak, FP8 against the FP8 peak; an unknown device gets no MFU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Timing, describe_machine, print_table, speed_ratio, time_in_turn, write_json
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes, choose_device, choose_threads
from fp8train.config.errors import UserError
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config
from fp8train.live.throughput import flops_per_token, memory_bytes, peak_of
from fp8train.step.trainer import Trainer

VARIANTS = {"O0": False, "FP8": True}
TINY = {"layers": 2, "micro_batch": 2, "seq": 64, "steps": 1, "rounds": 2, "warmup": 1, "vocab": 512}
SMALL = Path(__file__).parents[2] / "configs" / "small" / "llama.yaml"


@dataclass(frozen=True)
class Measured:
    """One variant.

    Attributes:
        timing: seconds of a step, by round.
        peak_bytes: most memory held at once.
        loss: of the first step, nats per token.
    """

    timing: Timing
    peak_bytes: float
    loss: float


def positive(text: str) -> int:
    """An integer from 1 up, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=SMALL, help="default: a Llama of 3M parameters")
    parser.add_argument("--layers", type=positive, help="instead of model.num_layers")
    parser.add_argument(
        "--micro-batch", type=positive, help="instead of train.micro_batch_size; one per step"
    )
    parser.add_argument("--seq", type=positive, help="instead of data.seq_length")
    parser.add_argument("--vocab", type=positive, help="vocabulary where the configuration names none (4096)")
    parser.add_argument("--steps", type=positive, help="steps a round (3)")
    parser.add_argument("--rounds", type=positive, help="alternating rounds (5)")
    parser.add_argument("--warmup", type=positive, help="untimed steps of each variant (3)")
    parser.add_argument("--compile", action="store_true", help="train.compile: block")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: all cores")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help=f"sizes for a quick look: {TINY}")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as in fp8train train")
    args = parser.parse_args()
    defaults = TINY if args.tiny else {"vocab": 4096, "steps": 3, "rounds": 5, "warmup": 3}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def make_config(args: argparse.Namespace, *, fp8: bool) -> Config:
    """The configuration with the command line laid over it.

    Raises:
        ConfigError: as ``fp8train config`` would.
    """
    overrides = [f"precision.gemm.fp8={str(fp8).lower()}", "logging.cast_statistics_interval=0"]
    if args.layers is not None:
        overrides.append(f"model.num_layers={args.layers}")
    if args.micro_batch is not None:
        overrides.append(f"train.micro_batch_size={args.micro_batch}")
    if args.seq is not None:
        overrides.append(f"data.seq_length={args.seq}")
    if args.compile:
        overrides.append("train.compile=block")
    overrides += args.overrides
    if args.micro_batch is None:
        size = load_config(args.config, overrides).config.train.micro_batch_size
    else:
        size = args.micro_batch
    return load_config(args.config, [*overrides, f"train.global_batch_size={size}"]).config


def make_step(config: Config, vocab_size: int, device: torch.device) -> Callable[[int], float]:
    """A training step on random tokens: takes the step number, returns the loss in nats per token."""
    trainer = Trainer(config, Processes(device, 1, 0, CountedGroup(None), None), vocab_size=vocab_size)
    shape = (4, 1, config.train.micro_batch_size, config.data.seq_length + 1)
    batches: Tensor = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))
    return lambda number: float(trainer.step(0, batches[number % len(batches)]).loss)


def _warm_up(config: Config, vocab_size: int, steps: int, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    step = make_step(config, vocab_size, device)
    for number in range(steps):
        step(number)
    pipe.send(memory_bytes(device)["memory/peak_bytes"])


def peak_on_cpu(config: Config, vocab_size: int, steps: int, threads: int) -> float:
    """Peak resident bytes of a process that builds the variant and runs ``steps`` steps.

    A process of its own, because freed memory stays with a process; forked before this one starts any thread.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_warm_up, args=(config, vocab_size, steps, threads, there))
    process.start()
    there.close()
    try:
        peak = here.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the process that measures memory ended with status {process.exitcode}") from None
    process.join()
    return float(peak)


def measure(
    args: argparse.Namespace, configs: dict[str, Config], device: torch.device
) -> dict[str, Measured]:
    """Memory of each variant, then the speed of all in turn."""
    vocab_size = next(iter(configs.values())).model.vocab_size or args.vocab
    peaks, losses, steps = {}, {}, {}
    if device.type == "cpu":
        for name, config in configs.items():
            peaks[name] = peak_on_cpu(config, vocab_size, args.warmup, args.threads)
        torch.set_num_threads(args.threads)
    for name, config in configs.items():
        held = 0
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        steps[name] = make_step(config, vocab_size, device)
        losses[name], *_ = (steps[name](number) for number in range(args.warmup))
        if device.type == "cuda":
            peaks[name] = memory_bytes(device)["memory/peak_bytes"] - held
    timings = time_in_turn(steps, rounds=args.rounds, steps_per_round=args.steps, warmup=0, device=device)
    return {name: Measured(timings[name], peaks[name], losses[name]) for name in configs}


def describe(config: Config, vocab_size: int, measured: Measured, device: torch.device) -> dict[str, Any]:
    """One variant's numbers, for JSON."""
    tokens = config.train.micro_batch_size * config.data.seq_length
    per_second = tokens / measured.timing.median
    flops = flops_per_token(config.model, config.data.seq_length, vocab_size=vocab_size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_of(name, fp8=config.precision.gemm.fp8)
    return {
        "tokens_per_second": per_second,
        "seconds_per_step": list(measured.timing.seconds),
        "peak_bytes": measured.peak_bytes,
        "tflops": per_second * flops / 1e12,
        "mfu": None if peak is None else per_second * flops / peak.flops,
        "mfu_peak": None if peak is None else peak.name,
        "first_loss": measured.loss,
    }


def report(args: argparse.Namespace, configs: dict[str, Config], device: torch.device) -> dict[str, Any]:
    """Measure, print the table, return what goes into the JSON."""
    results = measure(args, configs, device)
    base_name = next(iter(results))
    base = results[base_name]
    config = configs[base_name]
    vocab_size = config.model.vocab_size or args.vocab
    variants, rows = {}, []
    for name, measured in results.items():
        entry = describe(configs[name], vocab_size, measured, device)
        ratio = speed_ratio(measured.timing, base.timing)
        entry |= {"ratio_median": ratio.median, "ratio_range": [ratio.low, ratio.high]}
        entry["memory_ratio"] = measured.peak_bytes / base.peak_bytes
        variants[name] = entry
        mfu = "-" if entry["mfu"] is None else f"{entry['mfu']:.1%} of {entry['mfu_peak']}"
        memory = f"{measured.peak_bytes / 2**30:.2f} ({entry['memory_ratio']:.2f})"
        rows.append(
            (name, f"{entry['tokens_per_second']:.0f}", str(ratio), memory, f"{entry['tflops']:.3g}", mfu)
        )
    model = config.model.model_dump(mode="json") | {"vocab_size": vocab_size}
    batch = {"micro_batch_size": config.train.micro_batch_size, "seq_length": config.data.seq_length}
    sizes = f"{config.model.num_layers} layers, {' x '.join(map(str, batch.values()))} tokens"
    print(f"{args.config.name}: {sizes}, compile {config.train.compile}")
    header = ("variant", "tokens/s", f"speed / {base_name} (range)", "peak GiB (ratio)", "TFLOP/s", "MFU")
    print_table(header, rows)
    return {
        "machine": describe_machine(device),
        "config": args.config.name,
        "model": model,
        **batch,
        "compile": config.train.compile,
        "activation_checkpointing": config.train.activation_checkpointing,
        "variants": variants,
    }


def main() -> None:
    args = parse_arguments()
    try:
        device = choose_device(args.device, 0)
        args.threads = choose_threads(args.threads, 1)
        configs = {name: make_config(args, fp8=VARIANTS[name]) for name in args.variants}
        result = report(args, configs, device)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    if args.json is not None:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
