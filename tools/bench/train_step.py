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
  same steps (with ``PYTHONPATH=.``). ``--predictions`` puts that file's numbers beside what is measured.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from measure import Results, synchronize, write_json
from step_arguments import Point, argument_parser, finish_arguments, make_config, points_of
from step_prediction import predict
from step_summary import blocks_of, show, summarise

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes, choose_device, choose_threads
from fp8train.config.errors import UserError
from fp8train.config.schema import Config
from fp8train.live.throughput import memory_bytes
from fp8train.models.param_spec import ParamSpec
from fp8train.step.trainer import Trainer

MOST_SEQUENCES = 64  # of a micro-batch that is looked for


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

        def row(how: argparse.Namespace, point: Point, at: str) -> dict[str, Any]:
            sizes = {"layers": point.layers, "micro_batch": point.micro_batch, "seq": point.seq}
            return {"variant": name, "at": at, **sizes, **measure(how, one, point)}

        for point in points:
            yield row(args, point, "micro-batch")
        if args.memory is None or device.type == "cpu" or not largest:
            return
        quick = argparse.Namespace(
            **{**vars(args), "warmup": 1, "steps": 1, "rounds": 2}
        )  # its steps are long
        for point in points:
            size = largest_micro_batch(one, point.layers, point.seq, args.memory * 2**30)
            if size is not None:
                yield row(quick, Point(point.layers, size, point.seq), "memory")


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
    largest = turn == 0 and layers == max(point.layers for point in points_of(args))
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


def main() -> int:
    args = finish_arguments(argument_parser(__doc__))
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
