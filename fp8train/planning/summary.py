"""``fp8train config FILE --summary``: what a run would be, in ten lines, without importing torch.

Counts are arithmetic on the configuration; tests compare them with a built model and a trainer. The number of
processes is ``--world``, else the fewest that the layout has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from fp8train.config.linear_names import coverage, reasons_to_skip
from fp8train.config.resolve import ResolvedConfig
from fp8train.config.schema import Config
from fp8train.config.world import check_world, fewest_processes
from fp8train.live.console import format_bytes, format_count
from fp8train.planning.rank_bytes import RankBytes
from fp8train.planning.vocabulary import ASSUMED_VOCABULARY, known_vocabulary

_NVIDIA = Path("/proc/driver/nvidia")


def summarise(resolved: ResolvedConfig, world: int | None, *, nvidia: Path = _NVIDIA) -> str:
    """The lines, plain text.

    Args:
        resolved: the configuration.
        world: number of processes; None: the fewest.
        nvidia: the folder that NVIDIA's driver makes.

    Raises:
        ConfigError: so many processes cannot run it.
    """
    config = resolved.config
    vocabulary = known_vocabulary(config)
    processes = world or fewest_processes(config)
    dp, micro_batches = check_world(config, processes, origins=resolved.origins)
    counted = RankBytes(config, vocabulary or ASSUMED_VOCABULARY, dp=dp, micro_batches=micro_batches)
    stored = counted.largest()
    rows = [
        ("run", f"{config.run.name}, of {' <- '.join(reversed(resolved.sources))}"),
        ("model", _model(config, vocabulary)),
        ("parameters", _parameters(counted)),
        ("step", _step(config, dp, micro_batches)),
        ("length", _length(config, counted)),
        ("layout", _layout(config, processes, dp, asked=world is not None)),
        ("precision", f"{config.precision.level}, {_coverage(config)}"),
        ("bytes", f"{stored}{_transposed(config, counted)}{_of_largest_rank(config, dp)}"),
        ("all in", stored.all_in()),
        ("machine", "; ".join(_machine(config, nvidia))),
    ]
    return "".join(f"{name:<11} {text}\n" for name, text in rows)


def _model(config: Config, vocabulary: int | None) -> str:
    model = config.model
    kv = model.num_kv_heads
    heads = f"{model.num_heads} heads" + (
        f" ({kv} key/value {'head' if kv == 1 else 'heads'})" if kv != model.num_heads else ""
    )
    words = (
        f"vocabulary {vocabulary}"
        if vocabulary is not None
        else f"vocabulary {ASSUMED_VOCABULARY} assumed: no model.vocab_size and no dataset yet"
    )
    return (
        f"{model.family}, {model.num_layers} layers of width {model.hidden_size}, {heads}, "
        f"MLP {model.ffn_hidden_size}, context {config.data.seq_length}; {words}"
    )


def _parameters(counted: RankBytes) -> str:
    sizes = {fqn: math.prod(shape) for fqn, shape in counted.shapes.items()}
    in_plan = sum(sizes[fqn] for fqn in counted.in_plan)
    return f"{sum(sizes.values()):,}, {in_plan:,} of them in linears that multiply in FP8"


def _step(config: Config, dp: int, micro_batches: int) -> str:
    train, length = config.train, config.data.seq_length
    ramp = ", after a ramp" if train.batch_size_ramp else ""
    each = "micro-batch" if micro_batches == 1 else "micro-batches"
    return (
        f"{train.global_batch_size * length:,} tokens: {train.global_batch_size} samples of {length}{ramp}; "
        f"{micro_batches} {each} of {train.micro_batch_size} on each of {dp} data-parallel "
        f"{'rank' if dp == 1 else 'ranks'}"
    )


def _length(config: Config, counted: RankBytes) -> str:
    steps = config.total_steps
    tokens = config.train.batch_sizes.samples_before(steps) * config.data.seq_length
    per_parameter = tokens / sum(math.prod(shape) for shape in counted.shapes.values())
    each = f"{per_parameter:.3g}" if per_parameter < 100 else f"{per_parameter:,.0f}"
    return f"{steps:,} steps, {format_count(tokens)} tokens, {each} for each parameter"


def _layout(config: Config, processes: int, dp: int, *, asked: bool) -> str:
    parallel = config.parallel
    zero = f", ZeRO-1 by {parallel.zero_partition}" if parallel.zero == 1 and dp * parallel.cp > 1 else ""
    if config.engine == "deepspeed":
        zero = f", ZeRO-{parallel.zero} by DeepSpeed"
    line = (
        f"{processes} {'process' if processes == 1 else 'processes'} = dp {dp} x pp {parallel.pp} x "
        f"cp {parallel.cp} x tp {parallel.tp}{zero}"
    )
    return line if asked or parallel.dp != "auto" else f"{line}; --world N for more"


def _coverage(config: Config) -> str:
    gemm = config.precision.gemm
    if not gemm.fp8:
        return f"{config.precision.compute} GEMMs; FP8: off"
    return f"recipe {config.precision.recipe}, {coverage(reasons_to_skip(config.model, gemm))}"


def _of_largest_rank(config: Config, dp: int) -> str:
    """What the whole model's bytes are of, where ranks hold parts of it."""
    parallel = config.parallel
    several = parallel.tp * parallel.pp > 1 or (parallel.zero != "none" and dp * parallel.cp > 1)
    return " (the largest rank's part)" if several else ""


def _transposed(config: Config, counted: RankBytes) -> str:
    """What a GPU keeps beside that: weights in the layout of backward."""
    count = counted.transposed()
    if count == 0 or config.run.device == "cpu":
        return ""
    when = " while a step runs" if config.precision.weights == "fp8" else ""
    return f" (on a GPU + {format_bytes(count)} of transposed weights{when})"


def _machine(config: Config, nvidia: Path) -> Iterator[str]:
    """What of FP8 is not computed by FP8 units here, as far as can be told without torch."""
    gpu = nvidia.is_dir()
    on_cpu = config.run.device == "cpu" or not gpu
    yield f"run.device is {config.run.device}, {'an' if gpu else 'no'} NVIDIA driver here"
    gemm = config.precision.gemm
    if not gemm.fp8:
        yield "nothing is emulated"
    elif gemm.output.x.format == "e2m1":
        yield "FP4 is simulated everywhere: operands rounded to FP4, multiplied in high precision"
    elif on_cpu:
        compute = config.precision.compute.upper()
        yield f"on a CPU: FP8 GEMMs are computed on the same operands in {compute}"
    else:
        yield "FP8 GEMMs need compute capability 8.9; fp8train doctor says which this GPU has"
