"""Count one training step of a configuration on a GPU that need not be there, and predict its time.

    python tools/bench/count_step.py CONFIG.yaml [section.key=value ...] [--gpu H100] [--json FILE]
    python tools/bench/count_step.py CONFIG.yaml --levels O0 FP8 O1 O2 O3     # one line each

A real ``Trainer.step`` runs on tensors without values, with the branches that a GPU takes. It counts every
launch, the bytes it reads and writes, FLOPs, places where the host waits, live memory, and whether the
tensor cores take each GEMM as it lies. Two models, of one block and of two, give the cost of a block and
that of the rest; the model's own number of blocks then gives the whole. Times are ceilings
(``tools/bench/ceilings.py``), not measurements. States in host memory (``optimizer.offload``) are counted as
bytes over the bus; the step's time is without them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config
from fp8train.layers import grad_weight_op
from fp8train.optim.copy_queues import CopiesAtOnce, Queue
from fp8train.optim.host_states import Offload
from fp8train.planning.rank_bytes import RankBytes
from fp8train.step.trainer import Trainer
from tools.bench.ceilings import GPUS, Gpu
from tools.bench.step_arguments import VARIANTS
from tools.bench.step_counter import DEVICE, Counts, Row, StepCounter

PHASES = ("weights", "forward", "backward", "head", "reduce", "norm", "optimizer", "other")
"""Casts of new weights, blocks forward, all backward, the head's forward (which computes its gradient),
gradient reduction, gradient norm, optimizer, and the rest of a step."""

_CONTRIBUTIONS = (
    ("linear", "contribute_grad_weight"),
    ("fp8_linear", "contribute_grad_weight"),
    ("fp8_linear", "contribute_grad_weight_fp8"),
    ("fused_linear", "contribute_grad_weight"),
    ("fused_linear", "contribute_grad_weight_fp8"),
)


@dataclass(frozen=True)
class Model:
    """What was counted of a model with one number of blocks.

    Attributes:
        layers: number of blocks.
        counts: of a step.
        parameters: elements.
        persistent: bytes that exist between steps; without slots of states in host memory.
        peak: most bytes that existed at once; likewise.
        bus: bytes of states that come to the device, and that leave it.
    """

    layers: int
    counts: Counts
    parameters: int
    persistent: int
    peak: int
    bus: tuple[int, int]


class _Bus(CopiesAtOnce):
    """Counts what would be copied, by direction."""

    def __init__(self, counter: StepCounter) -> None:
        super().__init__(torch.device(DEVICE))
        self._counter, self.copied = counter, {"in": 0, "out": 0}

    def host_memory(self, nbytes: int) -> torch.Tensor:
        with _disable_current_modes():
            memory = super().host_memory(nbytes)
        self._counter.elsewhere(memory)
        return memory

    def copy(self, queue: Queue, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self.copied[queue] += sum(source.nbytes for source in sources)


@contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """Answer for a GPU where torch is asked about one, and leave initial values out."""
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.get_device_capability", lambda device=None: gpu.capability))
        stack.enter_context(patch("torch.cuda.get_device_name", lambda device=None: gpu.name))
        for module in ("gemm", "scaling"):
            stack.enter_context(patch(f"fp8train.kernels.{module}.cuda_version", lambda: (13, 0)))
        stack.enter_context(patch("fp8train.step.trainer.initialise", lambda *args: None))
        # As an operator on the meta device it would do nothing; here it is to hand its GEMM to the store.
        for user, name in _CONTRIBUTIONS:
            function = getattr(grad_weight_op, f"_{name}")
            stack.enter_context(patch(f"fp8train.layers.{user}.{name}", function))
        yield


def count(config: Config, gpu: Gpu, *, optimizer: bool = True) -> Model:
    """Build the trainer of a configuration on the meta device, and count its second step; without the update
    of the weights if there is to be no ``optimizer``."""
    processes = Processes(torch.device(DEVICE), 1, 0, CountedGroup(None), None)
    batch = config.train.micro_batch_size
    accumulation = config.train.global_batch_size // batch
    tokens = torch.zeros(accumulation, batch, config.data.seq_length + 1, dtype=torch.int64)
    with pretended(gpu), StepCounter(gpu) as counter:
        assert config.model.vocab_size is not None, "model.vocab_size must be set: there is no tokenizer here"
        bus = _Bus(counter)
        trainer = Trainer(config, processes, vocab_size=config.model.vocab_size, offload=Offload(bus))
        trainer._one_after_the_other = counter.recorded(  # type: ignore[method-assign]
            trainer._one_after_the_other
        )
        if not optimizer:
            for method in ("update", "end"):
                setattr(trainer.optimizer, method, lambda *args, **kwargs: None)
        _name_phases(trainer, counter)
        backward = counter.phased("backward", torch.Tensor.backward)
        with patch("torch.Tensor.backward", backward):
            trainer.step(0, tokens)  # the first step allocates what later ones find
            slots = trainer.optimizer.states.slot_bytes
            persistent = counter.live - slots
            counter.restart()
            bus.copied = {"in": 0, "out": 0}
            with counter.phase("other"):
                trainer.step(1, tokens)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    peak = max(counter.counts.peak.values()) - slots
    moved = bus.copied["in"], bus.copied["out"]
    return Model(config.model.num_layers, counter.counts, parameters, persistent, peak, moved)


def _name_phases(trainer: Trainer, counter: StepCounter) -> None:
    for owner, method, phase in (
        (trainer.optimizer, "update", "optimizer"),
        (trainer.optimizer._publisher, "write_targets", "weights"),
        (trainer.store, "global_norm", "norm"),
        (trainer.store, "finish", "reduce"),
        (trainer.model, "prepare", "weights"),
        (trainer.model, "blocks", "forward"),
        (trainer.model, "loss", "head"),
    ):
        setattr(owner, method, counter.phased(phase, getattr(owner, method)))


def resolve(file: Path, overrides: Sequence[str], layers: int) -> Config:
    """The configuration with this many blocks, one process, and no statistics."""
    extra = [f"model.num_layers={layers}", "run.device=cpu", "logging.cast_statistics_interval=0"]
    return load_config(file, [*overrides, *extra]).config


@dataclass(frozen=True)
class Line:
    """One line of the table: a phase of one block, or of everything else."""

    part: str
    phase: str
    launches: int
    elementwise_bytes: int
    gemm_flops: int
    attention_flops: int
    seconds: float


def _difference(phase: str, one: Counts, two: Counts) -> tuple[Line, Line]:
    """(a block's line, the rest's) of a phase."""

    def line(part: str, a: Counts, b: Counts | None, factor: int) -> Line:
        def value(name: str, **wanted: str) -> Any:
            first = getattr(a.total(phase=phase, **wanted), name)
            return first if b is None else factor * first - getattr(b.total(phase=phase, **wanted), name)

        return Line(
            part,
            phase,
            value("launches"),
            value("moved", kind="elementwise"),
            value("flops", kind="gemm_bf16") + value("flops", kind="gemm_fp8"),
            value("flops", kind="attention"),
            value("seconds"),
        )

    return line("block", two, one, 1), line("rest", one, two, 2)


@dataclass(frozen=True)
class Report:
    """What a configuration costs on a GPU, per optimizer step of one process.

    Attributes:
        layers: blocks of the whole model.
        tokens: of a step.
        parameters: of the whole model.
        block_parameters: of one block.
        lines: per phase, of one block and of the rest.
        syncs: lines where the host waits, with their numbers, in a model of one block.
        unrecordable: those, and copies from the host, in what ``run.cuda_graphs`` records.
        gemms: GEMMs of a block that the tensor cores do not take as they lie, with the reason.
        persistent: bytes between steps of the whole model.
        peak: most bytes at once of the whole model.
        bus: bytes of states from the host's memory, and to it.
        seconds: predicted time of a step.
        mfu: model FLOPs over time, as a share of the BF16 peak.
    """

    gpu: str
    layers: int
    tokens: int
    parameters: int
    block_parameters: int
    lines: list[Line]
    syncs: dict[str, int]
    unrecordable: dict[str, int]
    gemms: dict[str, int]
    persistent: int
    peak: int
    bus: tuple[int, int]
    seconds: float
    mfu: float

    def block(self, name: str, phases: Sequence[str] = PHASES) -> Any:
        """The sum of a field over phases, for one block."""
        return sum(
            getattr(line, name) for line in self.lines if line.part == "block" and line.phase in phases
        )

    def rest(self, name: str, phases: Sequence[str] = PHASES) -> Any:
        """The sum of a field over phases, for everything but the blocks."""
        return sum(getattr(line, name) for line in self.lines if line.part == "rest" and line.phase in phases)

    @property
    def tokens_per_second(self) -> float:
        """Predicted, of one process."""
        return self.tokens / self.seconds


def report(file: Path, overrides: Sequence[str], gpu: Gpu, *, optimizer: bool = True) -> Report:
    """Count models of one and two blocks, and put the whole together."""
    whole = load_config(file, [*overrides, "run.device=cpu"]).config
    one, two = (count(resolve(file, overrides, layers), gpu, optimizer=optimizer) for layers in (1, 2))
    lines = [line for phase in PHASES for line in _difference(phase, one.counts, two.counts)]
    layers = whole.model.num_layers

    def extended(name: str) -> Any:
        first, second = getattr(one, name), getattr(two, name)
        return first + (layers - 1) * (second - first)

    seconds = sum(line.seconds * (layers if line.part == "block" else 1) for line in lines)
    flops = sum(
        (line.gemm_flops + line.attention_flops) * (layers if line.part == "block" else 1) for line in lines
    )
    assert whole.model.vocab_size is not None
    slots = RankBytes(whole, whole.model.vocab_size, dp=1, micro_batches=1).largest().slots
    inward, outward = (a + (layers - 1) * (b - a) for a, b in zip(one.bus, two.bus, strict=True))
    problems = {str(gemm.problem): n for gemm, n in two.counts.gemms.items() if gemm.problem}
    return Report(
        gpu.name,
        layers,
        whole.train.global_batch_size * whole.data.seq_length,
        extended("parameters"),
        two.parameters - one.parameters,
        lines,
        dict(one.counts.syncs),
        {line: n for line, n in one.counts.unrecordable.items() if n},
        problems,
        extended("persistent") + slots,
        extended("peak") + slots,
        (inward, outward),
        seconds,
        flops / seconds / gpu.peak_bf16,
    )


def show(result: Report) -> None:
    """Print the table."""
    print(
        f"{result.gpu}, predicted: {result.layers} blocks, {result.parameters / 1e9:.2f} B parameters, "
        f"{result.tokens} tokens a step"
    )
    print(f"{'':22}{'launches':>9}{'elementwise GB':>16}{'GEMM TFLOP':>12}{'attention':>11}{'ms':>9}")
    for part in ("block", "rest"):
        for line in result.lines:
            if line.part == part and line.launches:
                print(
                    f"{part + ', ' + line.phase:22}{line.launches:9}{line.elementwise_bytes / 1e9:16.3f}"
                    f"{line.gemm_flops / 1e12:12.3f}{line.attention_flops / 1e12:11.3f}"
                    f"{line.seconds * 1e3:9.3f}"
                )
    print(f"host waits: {result.syncs}; where run.cuda_graphs would record: {result.unrecordable or 'none'}")
    print(f"GEMMs that the tensor cores do not take as they lie: {result.gemms or 'none'}")
    print(f"memory: {result.persistent / 1e9:.1f} GB between steps, {result.peak / 1e9:.1f} GB at the peak")
    if any(result.bus):
        into, out = (count / 1e9 for count in result.bus)
        print(f"over the bus: {into:.1f} GB to the device, {out:.1f} GB to the host")
    print(
        f"step: {result.seconds * 1e3:.1f} ms, {result.tokens_per_second:.0f} tokens/s, "
        f"{result.mfu:.1%} of the BF16 peak"
    )


def operations(file: Path, overrides: Sequence[str], gpu: Gpu, *, optimizer: bool) -> None:
    """Print what one block does, operation by operation: launches and bytes."""
    totals: dict[tuple[str, str], Row] = {}
    for layers, sign in ((1, -1), (2, 1)):
        counted = count(resolve(file, overrides, layers), gpu, optimizer=optimizer).counts
        for place, row in counted.rows.items():
            total = totals.setdefault((place.phase, place.operation), Row())
            total.add(sign * row.launches, sign * row.moved, sign * row.flops, sign * row.seconds)
    print(f"{'one block':10}  {'operation':44}{'launches':>9}{'GB':>9}{'ms':>9}")
    order = {phase: number for number, phase in enumerate(PHASES)}
    for (phase, name), row in sorted(totals.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        if row.launches > 0:
            print(f"{phase:10}  {name:44}{row.launches:9}{row.moved / 1e9:9.3f}{row.seconds * 1e3:9.3f}")


_PASSES = ("weights", "forward", "backward", "reduce", "norm")


def compare(file: Path, overrides: Sequence[str], gpu: Gpu, levels: Sequence[str]) -> dict[str, Report]:
    """Print a line for each level; launches and bytes are of one block, and without the optimizer."""
    print(f"{gpu.name}, predicted ({gpu.sources})")
    print(
        f"{'':5}{'launches':>9}{'GB':>7}{'block ms':>10}{'optimizer ms':>14}{'step ms':>9}{'tokens/s':>10}"
        f"{'MFU':>7}{'ratio':>7}{'resident GB':>13}{'peak GB':>9}"
    )
    found: dict[str, Report] = {}
    for level in levels:
        result = found[level] = report(file, [*overrides, *VARIANTS[level]], gpu)
        optimizer = ("optimizer", "weights")
        spent = result.layers * result.block("seconds", optimizer) + result.rest("seconds", optimizer)
        print(
            f"{level:5}{result.block('launches', _PASSES):9}"
            f"{result.block('elementwise_bytes', _PASSES) / 1e9:7.2f}"
            f"{result.block('seconds', ('forward', 'backward')) * 1e3:10.2f}{spent * 1e3:14.1f}"
            f"{result.seconds * 1e3:9.1f}{result.tokens_per_second:10.0f}{result.mfu:7.1%}"
            f"{found[levels[0]].seconds / result.seconds:7.2f}{result.persistent / 1e9:13.1f}"
            f"{result.peak / 1e9:9.1f}",
            flush=True,
        )
    return found


def places(counts: Counts, top: int) -> None:
    """Print the places that move most."""
    rows: dict[tuple[str, str, str], Row] = {}
    for place, row in counts.rows.items():
        if place.kind == "elementwise":
            key = (place.phase, place.line, place.operation)
            rows.setdefault(key, Row()).add(row.launches, row.moved, row.flops, row.seconds)
    print(f"{'GB':>8} {'launches':>8}  phase, line, operation")
    for key, row in sorted(rows.items(), key=lambda item: -item[1].moved)[:top]:
        print(f"{row.moved / 1e9:8.3f} {row.launches:8}  {', '.join(key)}")


def main() -> None:
    """Parse arguments, count, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument(
        "--places", type=int, default=0, help="print so many lines of the package that move most"
    )
    parser.add_argument("--operations", action="store_true", help="print what a block does, by operation")
    parser.add_argument("--no-optimizer", action="store_true", help="leave the update of the weights out")
    parser.add_argument("--levels", nargs="+", choices=VARIANTS, help="compare these, a line each")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    if args.levels:
        compared = compare(args.config, args.overrides, gpu, args.levels)
        if args.json is not None:
            reports = {level: asdict(one) for level, one in compared.items()}
            args.json.write_text(json.dumps(reports, indent=1) + "\n")
        return
    result = report(args.config, args.overrides, gpu, optimizer=not args.no_optimizer)
    show(result)
    if args.operations:
        operations(args.config, args.overrides, gpu, optimizer=not args.no_optimizer)
    if args.places:
        config = resolve(args.config, args.overrides, 1)
        places(count(config, gpu, optimizer=not args.no_optimizer).counts, args.places)
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
