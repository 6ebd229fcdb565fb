"""What it costs to be watched: training steps with and without guards and watchdog, in turn in one process.

    python tools/bench/guards_and_watchdog.py --json tools/bench/results/guards_and_watchdog_cpu.json

The model is the quick start's, on random tokens; a step is the loop's, from data to report. All variants
train one trainer, in short turns of random order, so that a drift of the machine meets them alike: with turns
of 60 steps the same machine scattered four times as much as with 8. A round has one turn of each; its ratio
is that of a variant to ``nothing`` within the round. The table shows the median over rounds with a 95 %
bootstrap interval, of CPU seconds of the whole process: what the watchdog's threads use counts, what other
users of the machine take does not. ``--wall`` takes the wall clock instead.

``nothing`` has neither the watch over spikes nor the numbers that a rank keeps of its own gradients;
``guards`` has both, ``guards and watchdog`` also heartbeats in a folder and a clock of slow ranks. ``often``
beats twenty times as often. What is too small for that is timed by itself, in microseconds: a heartbeat, a
phase that begins with the clock of slow ranks listening, and counting a collective, of which a single process
has none. To add a variant, write a context manager around the steps of a turn and name it in ``VARIANTS``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from measure import describe_machine, print_table, write_json

from fp8train.comm.calls import Calls
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.comm.progress import Progress
from fp8train.config.resolve import load_config
from fp8train.config.watchdog_schema import WatchdogConfig
from fp8train.step.trainer import Trainer
from fp8train.watch.stragglers import StepClock
from fp8train.watch.watchdog import Watchdog

CPU = torch.device("cpu")
VOCAB = 4096
BATCHES = 16


def watchdog(interval_s: float) -> Callable[[Trainer, Path], AbstractContextManager[object]]:
    """As in a run: heartbeats, and the clock of slow ranks."""

    @contextmanager
    def watched(trainer: Trainer, folder: Path) -> Iterator[None]:
        progress, calls = trainer.progress, trainer.processes.calls
        StepClock(progress, calls, CPU)
        with make_watchdog(progress, calls, folder, interval_s):
            yield
        progress.listeners.clear()

    return watched


@contextmanager
def nothing(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Neither loss and norm judged, nor a number kept of each bucket."""
    spikes, trainer.monitors.spikes = trainer.monitors.spikes, None
    for bucket in trainer.store.buckets:
        bucket.watched = False
    yield
    trainer.monitors.spikes = spikes
    for bucket in trainer.store.buckets:
        bucket.watched = True


VARIANTS: dict[str, Callable[[Trainer, Path], AbstractContextManager[object]]] = {
    "nothing": nothing,
    "guards": lambda trainer, folder: nullcontext(),
    "guards and watchdog": watchdog(1.0),
    "often": watchdog(0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart/llama_fp8.yaml")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--wall", action="store_true", help="wall clock instead of CPU seconds")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if options.wall else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(options.config, options.rounds, options.steps, clock, Path(folder))
    rows, numbers = [], {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["nothing"], strict=True)]
        low, high = interval(ratios)
        numbers[name] = {
            "ms_per_step": 1e3 * statistics.median(own) / options.steps,
            "ratio": statistics.median(ratios),
            "ratio_95": [low, high],
        }
        shown = f"{numbers[name]['ratio']:.4f} ({low:.4f} to {high:.4f})"
        rows.append([name, f"{numbers[name]['ms_per_step']:.2f}", shown])
    print_table(["variant", "ms a step", "ratio to nothing (95 %)"], rows)
    costs = single_costs()
    print(", ".join(f"{name}: {value:.2f} us" for name, value in costs.items()))
    if options.json:
        result = {
            "machine": describe_machine(CPU),
            "rounds": options.rounds,
            "steps_of_a_turn": options.steps,
        }
        result |= {"clock": "wall" if options.wall else "process", "variants": numbers, "microseconds": costs}
        write_json(options.json, result)


def measure(
    config_file: str, rounds: int, steps: int, clock: Callable[[], float], folder: Path
) -> dict[str, list[float]]:
    """Seconds of every turn of every variant, by round."""
    config = load_config(Path(config_file), [f"model.vocab_size={VOCAB}", "train.steps=1000000"]).config
    trainer = Trainer(config, Processes(CPU, 1, 0, CountedGroup(None), None), vocab_size=VOCAB)
    for bucket in trainer.store.buckets:  # as with several ranks
        bucket.watched = True
    size = config.train.micro_batch_size
    batches = torch.randint(VOCAB, (BATCHES, 1, size, config.data.seq_length + 1))
    position = 0

    def turn() -> float:
        nonlocal position
        began = clock()
        for _ in range(steps):
            trainer.progress.enter("data", step=position)
            trainer.step(position, batches[position % BATCHES])
            trainer.progress.enter("report")
            position += 1
        return clock() - began

    turn()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    order, generator = list(VARIANTS), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            with VARIANTS[name](trainer, folder):
                seconds[name].append(turn())
    return seconds


def interval(values: list[float], *, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40 - 1]


def single_costs(times: int = 2_000) -> dict[str, float]:
    """CPU microseconds of a heartbeat, of a phase's beginning, and of noting a collective and its wait."""
    progress, calls = Progress(), Calls()
    StepClock(progress, calls, CPU)
    group = calls.group("dp", range(8))
    with tempfile.TemporaryDirectory() as folder:
        dog = make_watchdog(progress, calls, Path(folder), 1.0)
        actions: dict[str, Callable[[], object]] = {
            "heartbeat": dog.tick,
            "phase": lambda: progress.enter("report"),
            "collective": lambda: group.begun("all_reduce/gradient", lambda: None)(),
        }
        found = {}
        for name, action in actions.items():
            began = time.process_time()
            for _ in range(times):
                action()
            found[name] = 1e6 * (time.process_time() - began) / times
    return found


def make_watchdog(progress: Progress, calls: Calls, folder: Path, interval_s: float) -> Watchdog:
    """The watchdog of a single process."""
    return Watchdog(
        WatchdogConfig(interval_s=interval_s), folder, progress, calls, rank=0, world_size=1,
        several_machines=False, end=lambda found, publish: None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
