"""Whether a model fits a process layout: arithmetic on a validated configuration, no process group.

Every message gives the numbers, and values that would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fp8train.config.all_sections import AllSections
from fp8train.config.batch_sizes import MAX_EXACT_MICRO_BATCHES, most_replicas
from fp8train.config.gradient_release import release_problems
from fp8train.config.operand_blocks import cut_blocks
from fp8train.precision.scale_blocks import MAX_BLOCK, SAVED_BLOCK, block_size
from fp8train.precision.state_formats import SCALED_STATES
from fp8train.update_rules.registry import rule_named
from fp8train.update_rules.rule import MatrixRule

_SWIGLU_UNIT = 128
_STATES = "optimizer states"
_TP = "parallel.tp"
_MOST_RANKS = 1024
"""Of one axis, that messages offer."""


@dataclass(frozen=True)
class LayoutProblem:
    """What does not fit, and the keys to change, worst first. ``legal_tp``: sizes of ``parallel.tp`` that the
    message offers."""

    message: str
    keys: tuple[str, ...]
    legal_tp: tuple[int, ...] = ()


def layout_problems(config: AllSections) -> Iterator[LayoutProblem]:
    """Everything that the file alone shows to be wrong with the layout.

    Where several reasons are against ``parallel.tp``, each offers the sizes that none is against.
    """
    problems = list(_all_problems(config))
    if sum(_TP in problem.keys for problem in problems) < 2:
        yield from problems
        return
    fitting = tuple(fitting_tp(config))
    for problem in problems:
        if _TP in problem.keys and problem.legal_tp != fitting:
            message = f"{problem.message}; {_TP}={one_of(fitting)} fits the rest too"
            problem = replace(problem, message=message)
        yield problem


def fitting_tp(config: AllSections) -> list[int]:
    """Sizes of ``parallel.tp``, 1 among them, that nothing in the file is against."""
    sizes = []
    for tp in common_divisors(config.model.num_heads):
        parallel = config.parallel.model_copy(update={"tp": tp})
        problems = _all_problems(config.model_copy(update={"parallel": parallel}))
        if tp == 1 or not any(_TP in problem.keys for problem in problems):
            sizes.append(tp)
    return sizes


def _all_problems(config: AllSections) -> Iterator[LayoutProblem]:
    yield from _batch(config)
    yield from _tensor_parallel(config)
    yield from _context_parallel(config)
    yield from _operand_blocks(config)
    yield from _gradient_reduction(config)
    yield from _pipeline_parallel(config)
    yield from _execution(config)
    yield from (LayoutProblem(*problem) for problem in release_problems(config))
    yield from _whole_matrices(config)


def _divisors(*numbers: int) -> str:
    return one_of(common_divisors(*numbers))


def common_divisors(*numbers: int) -> list[int]:
    """What divides all of these, up to the most ranks that a message offers."""
    common = math.gcd(*numbers)
    return [n for n in range(1, min(common, _MOST_RANKS) + 1) if common % n == 0]


def _whole_blocks(size: int, block: int) -> list[int]:
    """In how many parts ``size`` elements can be cut so that every part has whole blocks."""
    return common_divisors(size // block) if size % block == 0 else [1]


def one_of(numbers: Sequence[int]) -> str:
    """``1``, ``1 or 2``, ``1, 2 or 4``."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _batch(config: AllSections) -> Iterator[LayoutProblem]:
    train = config.train
    whole, micro = train.global_batch_size, train.micro_batch_size
    if whole % micro:
        below = whole // micro * micro
        yield LayoutProblem(
            f"global_batch_size ({whole}) must be a multiple of micro_batch_size ({micro}); nearest legal "
            f"values: {one_of([size for size in (below, below + micro) if size])}",
            ("train.global_batch_size", "train.micro_batch_size"),
        )


def _tensor_parallel(config: AllSections) -> Iterator[LayoutProblem]:
    tp, model = config.parallel.tp, config.model
    if tp == 1:
        return
    counts = _divided_by_tp(config)
    wrong = {name: count for name, count in counts.items() if count[0] % tp}
    if wrong:
        legal = common_divisors(*(count for count, _ in counts.values()))
        reasons = " and ".join(f"{name} = {count}{why}" for name, (count, why) in wrong.items())
        yield LayoutProblem(
            f"parallel.tp ({tp}) must divide {reasons}; legal: parallel.tp={one_of(legal)}",
            ("parallel.tp", *wrong),
            tuple(legal),
        )
    yield from _cut_blocks(config)
    if config.precision.activations == "fp8":
        gated = 2 if model.activation == "swiglu" else 1
        width = gated * model.ffn_hidden_size
        if width % tp == 0 and width // tp % SAVED_BLOCK:
            legal = _whole_blocks(width, SAVED_BLOCK)
            yield LayoutProblem(
                f"parallel.tp ({tp}) cuts {gated} * model.ffn_hidden_size = {width} inside groups of "
                f"{SAVED_BLOCK} elements (precision.activations: fp8); legal: {one_of(legal)}",
                ("parallel.tp", "precision.activations"),
                tuple(legal),
            )


def _divided_by_tp(config: AllSections) -> dict[str, tuple[int, str]]:
    """Counts that tensor parallelism cuts, by key, and a remark on each."""
    model = config.model
    unit = math.gcd(model.ffn_hidden_size, _SWIGLU_UNIT) if model.activation == "swiglu" else 1
    per_unit = f" units of {unit} (rows of gate and up stay together)" if unit > 1 else ""
    return {
        "model.num_heads": (model.num_heads, ""),
        "model.num_kv_heads": (model.num_kv_heads, " (key/value heads are not replicated)"),
        "model.ffn_hidden_size": (model.ffn_hidden_size // unit, per_unit),
        "model.vocab_multiple": (model.vocab_multiple, ""),
    }


def _cut_blocks(config: AllSections) -> Iterator[LayoutProblem]:
    """Row-parallel matrices are cut along their rows, where blocks of gradients and states lie."""
    tp, model, gradient = config.parallel.tp, config.model, config.precision.gradient
    states = config.precision.state
    in_blocks = [
        state.granularity == "block" and state.format in SCALED_STATES
        for state in (states.master, states.exp_avg, states.exp_avg_sq)
    ]
    limits = [(MAX_BLOCK, _STATES)] if any(in_blocks) else []
    if gradient.format != "high_precision" and gradient.fp8.reduce not in ("shared_scale", "exact"):
        limits.append((gradient.fp8.block, "gradients"))
    for name, row in (
        ("num_heads * head_dim", model.num_heads * model.head_dim),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        told = set()
        for limit, what in limits:
            block = block_size(row, limit)
            if row % tp or row // tp % block == 0 or block in told:
                continue
            own = block_size(row // tp)  # smaller blocks, see optim.parameter_state
            if what == _STATES and config.checkpoint.reshard == "requantise" and row // tp % own == 0:
                continue
            told.add(block)
            legal = _whole_blocks(row, block)
            yield LayoutProblem(
                f"parallel.tp ({tp}) cuts rows of {name} = {row} inside a scale block of {block} "
                f"elements ({what}); legal: {one_of(legal)}{_smaller_blocks(what, row // tp)}",
                ("parallel.tp",),
                tuple(legal),
            )


def _smaller_blocks(what: str, row: int) -> str:
    """The other way out, where there is one."""
    if what == "gradients":
        fits = next((size for size in range(MAX_BLOCK, 31, -1) if row % size == 0), None)
        return f", or precision.gradient.fp8.block: {fits}" if fits else ""
    return ", or checkpoint.reshard: requantise for smaller blocks" if row % block_size(row) == 0 else ""


def _context_parallel(config: AllSections) -> Iterator[LayoutProblem]:
    parallel, model = config.parallel, config.model
    parts = parallel.tp * parallel.cp
    if parts > 1 and config.data.seq_length % parts:
        length = config.data.seq_length
        yield LayoutProblem(
            f"data.seq_length ({length}) must be a multiple of parallel.tp * parallel.cp = {parts}: each of "
            f"these ranks holds a part of every sequence; nearest: {length // parts * parts or parts} or "
            f"{(length // parts + 1) * parts}",
            ("data.seq_length", "parallel.tp", "parallel.cp"),
        )
    if parallel.cp == 1:
        return
    for key, count in (("num_heads", model.num_heads), ("num_kv_heads", model.num_kv_heads)):
        if count % parts:
            yield LayoutProblem(
                f"parallel.tp * parallel.cp = {parallel.tp} * {parallel.cp} must divide model.{key} "
                f"({count}): attention exchanges heads for tokens; legal products: {_divisors(count)}",
                ("parallel.cp", f"model.{key}"),
            )


def _operand_blocks(config: AllSections) -> Iterator[LayoutProblem]:
    """One problem for each dimension that is cut inside blocks of GEMM operands."""
    seen = set()
    for cut in cut_blocks(config):
        if (cut.what, cut.block) in seen:
            continue
        seen.add((cut.what, cut.block))
        sizes: list[int] = []
        if cut.what == "data.seq_length":
            unit = cut.block * cut.parts
            legal = f"a multiple of {unit}, for example {max(cut.size // unit, 1) * unit}"
        else:
            sizes = _whole_blocks(cut.size, cut.block)
            legal = f"parallel.tp of {one_of(sizes)}"
        yield LayoutProblem(
            f"{' and '.join(cut.keys)}: {cut.what} = {cut.size} in {cut.parts} parts goes through scale "
            f"blocks of {cut.block} elements (precision.gemm.{cut.operand}); legal: {legal}, or a recipe "
            "without blocks",
            cut.keys,
            tuple(sizes),
        )


def _gradient_reduction(config: AllSections) -> Iterator[LayoutProblem]:
    gradient, parallel = config.precision.gradient, config.parallel
    reduce = gradient.fp8.reduce
    if gradient.format == "high_precision":
        return
    yield from _nodes(config)
    if reduce == "exact":
        yield from _exact(config)
    if gradient.fp8.sum == "native" and config.run.device == "cpu":
        yield LayoutProblem(
            "precision.gradient.fp8.sum: native is NCCL's and needs CUDA, but run.device is cpu; write ring "
            "or tree, which run everywhere",
            ("precision.gradient.fp8.sum", "run.device"),
        )
    if parallel.pp > 1 and reduce == "exact" and config.model.tie_embeddings:
        yield LayoutProblem(
            "reduce: exact rounds a parameter's gradient once per micro-batch, but with parallel.pp the "
            "first and the last stage round their parts of a tied embedding's alone; write "
            "model.tie_embeddings: false, or another reduction",
            ("precision.gradient.fp8.reduce", "model.tie_embeddings"),
        )


def _nodes(config: AllSections) -> Iterator[LayoutProblem]:
    """Without the number of processes: whether nodes of this size could divide any ranks that the batch can
    be shared among."""
    size, train, parallel = config.precision.gradient.fp8.node_size, config.train, config.parallel
    most = most_replicas(parallel.dp, parallel.cp, train.micro_batch_size, train.batch_sizes.all)
    if size is None or most == 0 or most % size == 0:
        return
    reason = f"parallel.dp * cp = {most}"
    if parallel.dp == "auto":
        reason = f"at most {most}, for a step has {most // parallel.cp} micro-batches to share"
    yield LayoutProblem(
        f"precision.gradient.fp8.node_size ({size}) must divide the data-parallel ranks: {reason}; legal: "
        f"{_divisors(most)}",
        ("precision.gradient.fp8.node_size", "train.global_batch_size", "train.micro_batch_size"),
    )


def _exact(config: AllSections) -> Iterator[LayoutProblem]:
    """``exact`` promises equal bits, so everything that a micro-batch's bits depend on must be fixed."""
    run, train, cp, key = config.run, config.train, config.parallel.cp, "precision.gradient.fp8.reduce"
    on_cpu, on_cuda = run.threads is not None, run.deterministic
    if not {"cpu": on_cpu, "cuda": on_cuda, "auto": on_cpu or on_cuda}[run.device]:
        threads = "equal threads per rank: set run.threads, for example run.threads=1"
        kernels = "kernels whose result does not depend on timing: set run.deterministic=true"
        needs = {"cpu": threads, "cuda": kernels, "auto": f"on a CPU {threads}; on CUDA {kernels}"}
        yield LayoutProblem(
            f"{key}: exact gives the same bits on any number of ranks only with {needs[run.device]}",
            (key, "run.threads", "run.deterministic"),
        )
    micro_batches = max(train.batch_sizes.all) // train.micro_batch_size * cp
    if micro_batches > MAX_EXACT_MICRO_BATCHES:
        parts = f" in {cp} parts each (parallel.cp)" if cp > 1 else ""
        yield LayoutProblem(
            f"{key}: exact adds at most {MAX_EXACT_MICRO_BATCHES} micro-batches a step in INT32; "
            f"train.global_batch_size ({train.global_batch_size}) of train.micro_batch_size "
            f"({train.micro_batch_size}){parts} are {micro_batches}; raise train.micro_batch_size",
            ("train.micro_batch_size", "train.global_batch_size", key),
        )


def _pipeline_parallel(config: AllSections) -> Iterator[LayoutProblem]:
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pp * parallel.pipeline.stages
    if parallel.pp == 1:
        return
    if stages > layers:
        yield LayoutProblem(
            f"parallel.pp * stages per rank = {parallel.pp} * {parallel.pipeline.stages} = {stages} stages, "
            f"but model.num_layers is {layers} and every stage needs a block; legal: parallel.pp of 1 to "
            f"{max(1, layers // parallel.pipeline.stages)}",
            ("parallel.pp", "model.num_layers"),
        )
    split = parallel.pipeline.layers
    if split is not None and (len(split) != stages or sum(split) != layers):
        yield LayoutProblem(
            f"pipeline.layers must list {stages} stages that add up to model.num_layers ({layers}); it lists "
            f"{len(split)} that add up to {sum(split)}",
            ("parallel.pipeline.layers",),
        )


def _execution(config: AllSections) -> Iterator[LayoutProblem]:
    parallel = config.parallel
    if config.train.compile == "off":
        return
    if parallel.tp > 1 or parallel.cp > 1:
        yield LayoutProblem(
            "train.compile: block cannot compile the communication of parallel.tp and parallel.cp yet; write "
            "train.compile: off",
            ("train.compile", "parallel.tp"),
        )
    if parallel.pipeline.schedule in ("interleaved_zero_bubble", "zbv"):
        yield LayoutProblem(
            f"train.compile: block cannot split backward for the schedule {parallel.pipeline.schedule}; "
            "write train.compile: off, or schedule: 1f1b or interleaved_1f1b",
            ("train.compile", "parallel.pipeline.schedule"),
        )


def _whole_matrices(config: AllSections) -> Iterator[LayoutProblem]:
    """What would cut the matrices of a rule that needs them whole."""
    parallel, name = config.parallel, config.optimizer.name
    if not issubclass(rule_named(name), MatrixRule):
        return
    needs = f"optimizer.name: {name} updates whole matrices, but"
    if parallel.tp > 1:
        yield LayoutProblem(
            f"{needs} parallel.tp ({parallel.tp}) cuts them; write parallel.tp: 1",
            (_TP, "optimizer.name"),
            (1,),
        )
    if parallel.zero != "none" and parallel.zero_partition == "rows":
        yield LayoutProblem(
            f"{needs} parallel.zero_partition: rows cuts their states; write parallel.zero_partition: "
            "whole_tensor",
            ("parallel.zero_partition", "optimizer.name"),
        )
