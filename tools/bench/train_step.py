"""Tokens per second, peak memory and MFU of a training step, of any variants of any configuration.

    python tools/bench/train_step.py --config configs/llama/llama3_8b.yaml --layers 1 3 --seq 2048 8192
    python tools/bench/train_step.py --tiny

The step is the one that ``fp8train train`` runs (forward, loss, backward, gradient store, clipping, AdamW
with FP32 masters), on random tokens: no dataset is opened. ``--layers`` cuts the model to what a card holds.
Embedding and head are not cut, so few layers of a large vocabulary understate what FP8 gains; two numbers of
layers give the time of one block, and so that of the whole model.

* One trainer exists at a time: a second one's memory, and what it leaves in caches, would be measured too.
  So variants are built, measured and freed one after the other, in several *turns*; a ratio is that of the
  same measurement of the same turn, and its range over turns shows how the machine drifted.
* ``--memory``: the largest micro-batch whose peak stays below so many bytes, found from two small ones, is
  measured as well: what saved memory is worth.
* Memory, CUDA: the allocator's peak over a measurement. On a CPU: peak resident size of a forked process that
  runs the warm-up, torch's own 300 MB included.
* TFLOP/s and MFU: :mod:`fp8train.live.throughput`. A token takes ``6 · matmul parameters
  + 6 · layers · heads · head_dim · sequence`` FLOPs: forward 2 for each weight, and in attention
  2·2·S·head_dim for each head (scores, then values), of which the causal mask leaves half; backward twice the
  forward. BF16 is held against the BF16 peak, FP8 against the FP8 peak; an unknown device gets no MFU.
* ``--predict`` measures nothing and needs no GPU: it writes what ``tools/bench/count_step.py`` counts of the
  same steps. ``--predictions`` puts that file's numbers beside what is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import Ratio, Results, Timing, print_table, speed_ratio, synchronize, write_json

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes, choose_device, choose_threads
from fp8train.config.errors import UserError
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config
from fp8train.live.throughput import flops_per_token, memory_bytes, peak_of
from fp8train.models.param_spec import ParamSpec
from fp8train.step.trainer import Trainer

VARIANTS = {
    "O0": ("precision.level=O0", "precision.gemm.fp8=false"),
    "FP8": ("precision.level=O0", "precision.gemm.fp8=true"),
    **{level: (f"precision.level={level}",) for level in ("O1", "O2", "O3")},
}
"""Overrides of a variant by its name; ``--variant`` adds others."""
TINY = {"layers": [2], "micro_batch": 2, "seq": [64], "steps": 1, "rounds": 1, "warmup": 1, "vocab": 512}
DEFAULTS = {"vocab": 4096, "steps": 3, "rounds": 3, "warmup": 3}
SMALL = Path(__file__).parents[2] / "configs" / "small" / "llama.yaml"
MOST_SEQUENCES = 64  # of a micro-batch that is looked for


@dataclass(frozen=True)
class Point:
    """What is measured of a variant: blocks, sequences of a micro-batch, their length."""

    layers: int
    micro_batch: int
    seq: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch * self.seq


@dataclass
class Built:
    """A trainer to be measured, and the seconds of its optimizer's last steps.

    Attributes:
        trainer: with all its memory.
        vocab_size: tokens are below.
        device: where it is.
        marks: begin and end of each optimizer step: events, or seconds on a CPU.
    """

    trainer: Trainer
    vocab_size: int
    device: torch.device
    marks: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        update = self.trainer.optimizer.step

        def timed(*args: Any, **kwargs: Any) -> None:
            begin = self._mark()
            update(*args, **kwargs)
            self.marks.append((begin, self._mark()))

        self.trainer.optimizer.step = timed  # type: ignore[method-assign]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def optimizer_seconds(self) -> float:
        """Median of the steps since the last call; NaN without any."""
        synchronize(self.device)
        on_gpu = self.device.type == "cuda"
        seconds = [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in self.marks]
        self.marks.clear()
        return statistics.median(seconds) if seconds else math.nan

    def step_of(self, point: Point) -> Callable[[int], float]:
        """A step on random tokens: takes its number, returns the loss in nats per token."""
        shape = (4, 1, point.micro_batch, point.seq + 1)
        generator = torch.Generator().manual_seed(1)
        batches = torch.randint(0, self.vocab_size, shape, generator=generator)
        return lambda number: float(self.trainer.step(0, batches[number % len(batches)]).loss)


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
    parser.add_argument("--layers", type=positive, nargs="+", help="instead of model.num_layers")
    parser.add_argument(
        "--micro-batch", type=positive, help="instead of train.micro_batch_size; one per step"
    )
    parser.add_argument("--seq", type=positive, nargs="+", help="instead of data.seq_length")
    parser.add_argument("--memory", type=float, help="GiB that the largest micro-batch may take; CUDA")
    parser.add_argument("--vocab", type=positive, help="vocabulary where the configuration names none (4096)")
    parser.add_argument("--steps", type=positive, help="steps of one measurement (3)")
    parser.add_argument("--rounds", type=positive, help="measurements in a turn (3)")
    parser.add_argument("--turns", type=positive, default=2, help="how often each variant is built (2)")
    parser.add_argument("--warmup", type=positive, help="untimed steps of each variant (3)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="build nothing after this time")
    parser.add_argument("--patience", type=float, default=math.inf, help="no further round after this time")
    parser.add_argument("--compile", action="store_true", help="train.compile: block")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: all cores")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", default=["O0", "FP8"], help=", ".join(VARIANTS)
    )
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help="one more"
    )
    parser.add_argument("--tiny", action="store_true", help=f"sizes for a quick look: {TINY}")
    parser.add_argument(
        "--predict", metavar="GPU", help="count instead, for this GPU of tools/bench/ceilings.py"
    )
    parser.add_argument("--predictions", type=Path, help="what --predict wrote")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as in fp8train train")
    args = parser.parse_args()
    for name, value in (TINY if args.tiny else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    known = {name: VARIANTS[name] for name in args.variants if name in VARIANTS}
    args.chosen = known | {name: tuple(overrides) for name, *overrides in args.variant}
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"--variants: no {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    return args


def overrides_of(args: argparse.Namespace, name: str, micro_batch: int, seq: int) -> list[str]:
    """Everything on the command line that a variant's configuration is laid over with, layers apart."""
    overrides = ["logging.cast_statistics_interval=0", *args.chosen[name]]
    overrides += ["train.compile=block"] if args.compile else []
    overrides += args.overrides
    return [
        *overrides,
        f"data.seq_length={seq}",
        f"train.micro_batch_size={micro_batch}",
        f"train.global_batch_size={micro_batch}",
    ]


def make_config(args: argparse.Namespace, name: str, point: Point) -> Config:
    """The configuration with the command line laid over it.

    Raises:
        ConfigError: as ``fp8train config`` would.
    """
    overrides = overrides_of(args, name, point.micro_batch, point.seq)
    return load_config(args.config, [*overrides, f"model.num_layers={point.layers}"]).config


def points_of(args: argparse.Namespace) -> list[Point]:
    """All sizes of the command line; the file's where it names none."""
    own = load_config(args.config, args.overrides).config
    micro_batch = args.micro_batch or own.train.micro_batch_size
    return [
        Point(layers, micro_batch, seq)
        for layers in args.layers or [own.model.num_layers]
        for seq in args.seq or [own.data.seq_length]
    ]


def value_on_device(spec: ParamSpec, seed: int, device: torch.device) -> torch.Tensor:
    """Like :func:`fp8train.models.param_spec.initial_value`, drawn on the device: other numbers of the same
    distribution. A CPU takes 20 seconds for a vocabulary of 128k."""
    if spec.init != "normal":
        return torch.full(spec.global_shape, 1.0 if spec.init == "ones" else 0.0, device=device)
    generator = torch.Generator(device).manual_seed(seed + sum(spec.fqn.encode()))
    return torch.empty(spec.global_shape, device=device).normal_(0.0, spec.init_std, generator=generator)


@contextmanager
def built(config: Config, vocab: int, device: torch.device) -> Iterator[Built]:
    """A trainer, and nothing of it afterwards."""
    with ExitStack() as stack:
        if device.type == "cuda":
            fill = patch(
                "fp8train.models.build.initial_value", lambda spec, s: value_on_device(spec, s, device)
            )
            stack.enter_context(fill)
        vocab_size = config.model.vocab_size or vocab
        processes = Processes(device, 1, 0, CountedGroup(None), None)
        result = Built(Trainer(config, processes, vocab_size=vocab_size), vocab_size, device)
    try:
        yield result
    finally:
        del result.trainer, result
        release(device)


def release(device: torch.device) -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _warm_up(config: Config, vocab: int, point: Point, steps: int, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    with built(config, vocab, device) as one:
        step = one.step_of(point)
        for number in range(steps):
            step(number)
        pipe.send(memory_bytes(device)["memory/peak_bytes"])


def peak_on_cpu(config: Config, vocab: int, point: Point, steps: int, threads: int) -> float:
    """Peak resident bytes of a process that builds the variant and runs ``steps`` steps.

    A process of its own, because freed memory stays with a process; forked before this one starts any thread.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_warm_up, args=(config, vocab, point, steps, threads, there))
    process.start()
    there.close()
    try:
        peak = here.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the process that measures memory ended with status {process.exitcode}") from None
    process.join()
    return float(peak)


def peak_of_step(one: Built, point: Point) -> float:
    """The allocator's peak over one step; infinite if memory does not suffice."""
    torch.cuda.reset_peak_memory_stats(one.device)
    enough = False
    with suppress(torch.OutOfMemoryError):
        one.step_of(point)(0)
        enough = True
    if enough:
        return memory_bytes(one.device)["memory/peak_bytes"]
    release(one.device)  # only now: what was raised kept the step's tensors
    return math.inf


def largest_micro_batch(one: Built, layers: int, seq: int, limit: float) -> int | None:
    """The most sequences whose step stays within ``limit`` bytes; None if one does not."""
    first, second = (peak_of_step(one, Point(layers, size, seq)) for size in (1, 2))
    if first > limit:
        return None
    if second > limit:
        return 1
    each = max(second - first, 1.0)
    size = min(MOST_SEQUENCES, 1 + int((limit - first) / each))
    while size > 2 and peak_of_step(one, Point(layers, size, seq)) > limit:
        size -= max(1, size // 16)
    return size


def measure(args: argparse.Namespace, one: Built, point: Point) -> dict[str, Any]:
    """Warm up, then time: seconds of a step by round, the optimizer's share, and the peak."""
    device, step = one.device, one.step_of(point)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses = [step(number) for number in range(args.warmup)]
    one.optimizer_seconds()
    seconds, begin = [], time.perf_counter()
    for number in range(args.rounds):
        synchronize(device)
        start = time.perf_counter()
        for i in range(args.steps):
            step(number * args.steps + i)
        synchronize(device)
        seconds.append((time.perf_counter() - start) / args.steps)
        if time.perf_counter() - begin > args.patience:
            break
    row = {"seconds": seconds, "optimizer_seconds": one.optimizer_seconds(), "loss": losses[0]}
    if device.type == "cuda":
        row["peak_bytes"] = memory_bytes(device)["memory/peak_bytes"]
    return row


def measure_variant(
    args: argparse.Namespace, name: str, points: Sequence[Point], device: torch.device, *, largest: bool
) -> Iterator[dict[str, Any]]:
    """Build a variant with one number of blocks; rows of its points, then of the largest micro-batches."""
    config = make_config(args, name, max(points, key=lambda point: point.seq))
    with built(config, args.vocab, device) as one:

        def row(point: Point, at: str) -> dict[str, Any]:
            sizes = {"layers": point.layers, "micro_batch": point.micro_batch, "seq": point.seq}
            return {"variant": name, "at": at, **sizes, **measure(args, one, point)}

        for point in points:
            yield row(point, "micro-batch")
        if args.memory is None or device.type == "cpu" or not largest:
            return
        for point in points:
            size = largest_micro_batch(one, point.layers, point.seq, args.memory * 2**30)
            if size is not None:
                yield row(Point(point.layers, size, point.seq), "memory")


def add_rows(
    args: argparse.Namespace,
    results: Results,
    device: torch.device,
    turn: int,
    name: str,
    points: list[Point],
) -> None:
    """One variant with one number of blocks, in one turn."""
    layers = points[0].layers
    largest = layers == max(point.layers for point in points_of(args))
    problem = None
    try:
        for row in measure_variant(args, name, points, device, largest=largest):
            results.add(turn=turn, **row)
    except UserError:
        raise
    except RuntimeError as error:  # out of memory, or a kernel's
        problem = f"{name}, {layers} layers, turn {turn}: {type(error).__name__}: {str(error)[:500]}"
    if problem is not None:
        results.fail(problem)
        release(device)  # only now: the error kept tensors


def run(args: argparse.Namespace, results: Results, device: torch.device) -> dict[tuple[str, Point], float]:
    """All turns of all variants, one trainer at a time. Returns peak bytes, on a CPU."""
    begin, points = time.monotonic(), points_of(args)
    peaks = {}
    if device.type == "cpu":
        for name in args.chosen:
            for point in points:
                config = make_config(args, name, point)
                peaks[name, point] = peak_on_cpu(config, args.vocab, point, args.warmup, args.threads)
        torch.set_num_threads(args.threads)
    for turn in range(args.turns):
        for layers in sorted({point.layers for point in points}, reverse=True):
            for name in args.chosen:
                if time.monotonic() - begin > args.seconds:
                    if turn == 0:
                        results.fail(f"{name}, {layers} layers: no time left of {args.seconds:g} s")
                    return peaks
                add_rows(args, results, device, turn, name, [p for p in points if p.layers == layers])
    return peaks


def timing_of(rows: Sequence[dict[str, Any]]) -> Timing:
    """All measurements of one variant at one point."""
    return Timing(tuple(seconds for row in rows for seconds in row["seconds"]))


def ratio_of(variant: Timing, base: Timing) -> Ratio:
    """Speed of ``variant`` over ``base``; as many measurements as both have."""
    n = min(len(variant.seconds), len(base.seconds))
    return speed_ratio(Timing(variant.seconds[:n]), Timing(base.seconds[:n]))


def prediction_key(config: str, name: str, point: Point) -> str:
    """How a prediction is found again."""
    return f"{config}, {name}, {point.layers} layers, {point.micro_batch} x {point.seq}"


def summarise(
    args: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    device: torch.device,
    peaks: dict[tuple[str, Point], float],
) -> list[dict[str, Any]]:
    """One entry for each variant and point: medians, ratios to the first variant, and what was predicted."""
    predicted = {} if args.predictions is None else json.loads(args.predictions.read_text())["predicted"]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        place = (row["at"], row["layers"], row["seq"], row["variant"])
        grouped.setdefault(place, []).append(row)
    result = []
    for (at, layers, seq, name), own in grouped.items():
        point = Point(layers, own[0]["micro_batch"], seq)
        config = make_config(args, name, point)
        own = [row for row in own if row["micro_batch"] == point.micro_batch]
        timing, base_rows = timing_of(own), grouped.get((at, layers, seq, next(iter(args.chosen))), own)
        # tokens per second compare at equal memory, where micro-batches differ
        weight = base_rows[0]["micro_batch"] / point.micro_batch
        ratio = ratio_of(Timing(tuple(s * weight for s in timing.seconds)), timing_of(base_rows))
        per_second = point.tokens / timing.median
        memory, base_memory = (
            peaks[one["variant"], point] if peaks else max(row["peak_bytes"] for row in those)
            for one, those in ((own[0], own), (base_rows[0], base_rows))
        )
        vocab = config.model.vocab_size or args.vocab
        flops = flops_per_token(config.model, seq, vocab_size=vocab)
        peak = peak_of(device_name, fp8=config.precision.gemm.fp8)
        result.append(
            {
                "variant": name,
                "at": at,
                "layers": layers,
                "micro_batch_size": point.micro_batch,
                "seq_length": seq,
                "tokens_per_second": per_second,
                "seconds_per_step": list(timing.seconds),
                "seconds": timing.median,
                "optimizer_seconds": statistics.median(row["optimizer_seconds"] for row in own),
                "peak_bytes": memory,
                "memory_ratio": memory / base_memory,
                "ratio_median": ratio.median,
                "ratio_range": [ratio.low, ratio.high],
                "tflops": per_second * flops / 1e12,
                "mfu": None if peak is None else per_second * flops / peak.flops,
                "mfu_peak": None if peak is None else peak.name,
                "first_loss": own[0]["loss"],
                "predicted": predicted.get(prediction_key(args.config.name, name, point)),
            }
        )
    return result


def blocks_of(args: argparse.Namespace, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the smallest and the largest number of layers: the time of one block, and of the model's own
    number of them."""
    whole = load_config(args.config, args.overrides).config.model.num_layers
    found = []
    by_place: dict[tuple[str, int, int], dict[int, float]] = {}
    for entry in entries:
        if entry["at"] == "micro-batch":
            place = (entry["variant"], entry["micro_batch_size"], entry["seq_length"])
            by_place.setdefault(place, {})[entry["layers"]] = entry["seconds"]
    for (name, micro_batch, seq), seconds in by_place.items():
        few, many = min(seconds), max(seconds)
        if few == many:
            continue
        block = (seconds[many] - seconds[few]) / (many - few)
        step = seconds[few] + (whole - few) * block
        sizes = {"micro_batch_size": micro_batch, "seq_length": seq}
        found.append(
            {"variant": name, **sizes, "block_seconds": block, "layers": whole, "step_seconds": step}
        )
    return found


def show(
    args: argparse.Namespace, entries: Sequence[dict[str, Any]], blocks: Sequence[dict[str, Any]]
) -> None:
    """Print the tables."""
    base, rows = next(iter(args.chosen)), []
    for entry in entries:
        sizes = f"{entry['layers']} x {entry['micro_batch_size']} x {entry['seq_length']}"
        mfu = "-" if entry["mfu"] is None else f"{entry['mfu']:.1%}"
        said = entry["predicted"]
        rows.append(
            (
                f"{entry['variant']}, same {entry['at']}",
                sizes,
                f"{entry['tokens_per_second']:.0f}",
                str(Ratio(entry["ratio_median"], *entry["ratio_range"])),
                f"{entry['seconds'] * 1e3:.1f}",
                "-" if said is None else f"{said['seconds'] * 1e3:.1f}",
                f"{entry['optimizer_seconds'] * 1e3:.1f}",
                f"{entry['peak_bytes'] / 2**30:.2f} ({entry['memory_ratio']:.2f})",
                "-" if said is None else f"{said['peak_bytes'] / 2**30:.2f}",
                f"{entry['tflops']:.3g}",
                mfu,
            )
        )
    print(f"{args.config.name}, compile {'block' if args.compile else 'off'}")
    header = ("variant", "layers x batch x seq", "tokens/s", f"speed / {base} (range)", "ms", "predicted")
    print_table((*header, "optimizer", "peak GiB (ratio)", "predicted", "TFLOP/s", "MFU"), rows)
    if blocks:
        table = [
            (
                b["variant"],
                f"{b['micro_batch_size']} x {b['seq_length']}",
                f"{b['block_seconds'] * 1e3:.2f}",
                f"{b['step_seconds'] * 1e3:.1f}",
            )
            for b in blocks
        ]
        header = ("variant", "batch x seq", "ms a block", f"ms of a step of {blocks[0]['layers']} blocks")
        print_table(header, table)


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """What is counted of every variant at every point, by :func:`prediction_key`.

    The optimizer's work does not depend on the tokens: it is counted once.
    """
    from tools.bench.ceilings import GPUS
    from tools.bench.count_step import Model, count, resolve

    found: dict[str, Any] = {}
    for name in args.chosen:
        update: list[tuple[int, float]] = []
        for place in {(point.micro_batch, point.seq): None for point in points_of(args)}:
            overrides = overrides_of(args, name, *place)
            models = [
                count(resolve(args.config, overrides, layers), GPUS[args.predict], optimizer=not update)
                for layers in (1, 2)
            ]
            if not update:
                rows = [model.counts.total(phase="optimizer") for model in models]
                update = [(row.launches, row.seconds) for row in rows]
                added = [(0, 0.0), (0, 0.0)]
            else:
                added = update

            def value(model: Model, more: tuple[int, float]) -> dict[str, float]:
                row = model.counts.total()
                syncs = sum(model.counts.syncs.values())
                launches, seconds = row.launches + more[0], row.seconds + more[1]
                return {"seconds": seconds, "launches": launches, "peak_bytes": model.peak, "syncs": syncs}

            one, two = (value(model, more) for model, more in zip(models, added, strict=True))
            optimizer = [seconds for _, seconds in update]
            one["optimizer_seconds"], two["optimizer_seconds"] = optimizer
            for point in points_of(args):
                if (point.micro_batch, point.seq) == place:
                    said = {key: one[key] + (point.layers - 1) * (two[key] - one[key]) for key in one}
                    found[prediction_key(args.config.name, name, point)] = said
                    print(prediction_key(args.config.name, name, point), said, flush=True)
    return found


def main() -> int:
    args = parse_arguments()
    try:
        if args.predict is not None:
            document = {"complete": True, "gpu": args.predict, "predicted": predict(args)}
            if args.json is not None:
                write_json(args.json, document)
            return 0
        device = choose_device(args.device, 0)
        args.threads = choose_threads(args.threads, 1)
        first = make_config(args, next(iter(args.chosen)), points_of(args)[0])  # errors before any work
        model = first.model.model_dump(mode="json") | {"vocab_size": first.model.vocab_size or args.vocab}
        about = {"config": args.config.name, "model": model, "compile": first.train.compile}
        about["activation_checkpointing"] = first.train.activation_checkpointing
        results = Results(args.json, device, **about)
        peaks = run(args, results, device)
        entries = summarise(args, results.rows, device, peaks)
        blocks = blocks_of(args, entries)
        show(args, entries, blocks)
        return results.finish(variants=entries, blocks=blocks)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
