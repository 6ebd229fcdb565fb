"""Checks that need the number of processes, as plain arithmetic: usable before, and without, a process
group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fp8train.config.errors import ConfigError
from fp8train.config.layout import LayoutProblem, common_divisors, fitting_tp, one_of
from fp8train.config.nodes import Origin
from fp8train.config.schema import Config


def model_ranks(config: Config) -> int:
    """Processes that hold one copy of the model: ``pp * cp * tp``."""
    parallel = config.parallel
    return parallel.pp * parallel.cp * parallel.tp


def data_parallel_size(
    config: Config, world_size: int, *, origins: Mapping[str, Origin] | None = None
) -> int:
    """Data-parallel ranks of a run with ``world_size`` processes.

    Raises:
        ConfigError: the world size is not ``dp * pp * cp * tp``; states the formula and what would fit.
    """
    assert world_size >= 1
    parallel, each = config.parallel, model_ranks(config)
    dp = parallel.dp
    if world_size % each == 0 and dp in ("auto", world_size // each):
        return world_size // each
    numbers = f"{dp} * {parallel.pp} * {parallel.cp} * {parallel.tp}"
    if each == 1:
        fix = f"write parallel.dp: auto or {world_size}, or start {dp} processes"
        need = dp
    elif dp == "auto":
        need = max(1, world_size // each) * each
        fix = f"start a multiple of {each} processes, for example {need}{_other_tp(config, world_size)}"
    else:
        need = dp * each
        fix = f"start {need} processes, or change parallel.pp, cp or tp"
        if world_size % each == 0:
            fix = f"write parallel.dp: auto or {world_size // each}, or start {need} processes"
    raise ConfigError(
        f"{_place('parallel.dp', origins)}parallel.dp * pp * cp * tp = {numbers} must equal the number of "
        f"processes ({world_size}): {fix} (torchrun --nproc-per-node={need} on one node)"
    )


def _other_tp(config: Config, world_size: int) -> str:
    """Sizes of ``parallel.tp`` that would do for the processes that there are."""
    parallel = config.parallel
    others = [
        tp
        for tp in fitting_tp(config)
        if world_size % (parallel.pp * parallel.cp * tp) == 0 and parallel.tp > 1
    ]
    return f", or write parallel.tp={one_of(others)}" if others else ""


def accumulation_steps(config: Config, dp: int, *, origins: Mapping[str, Origin] | None = None) -> int:
    """Micro-batches per rank and optimizer step: ``global_batch_size / (micro_batch_size * dp)``.

    Raises:
        ConfigError: the division leaves a rest; names the nearest legal global batch sizes.
    """
    assert dp >= 1
    global_batch, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    per_round = micro_batch * dp
    if global_batch % per_round == 0:
        return global_batch // per_round
    below = global_batch // per_round * per_round
    legal = " or ".join(str(value) for value in (below, below + per_round) if value)
    raise ConfigError(
        f"{_place('train.global_batch_size', origins)}train.global_batch_size ({global_batch}) "
        f"must be a multiple of train.micro_batch_size * dp = {micro_batch} * {dp} = {per_round}; "
        f"nearest legal values: {legal}"
    )


def check_pipeline(
    config: Config, micro_batches: int, *, origins: Mapping[str, Origin] | None = None
) -> None:
    """Whether the pipeline's schedule can run this many micro-batches a step.

    Raises:
        ConfigError: ``1f1b`` with fewer than stages, an interleaved one with unequal rounds; names legal
            global batch sizes.
    """
    parallel = config.parallel
    schedule, pp = parallel.pipeline.schedule, parallel.pp
    if pp == 1 or _schedule_runs(schedule, pp, micro_batches):
        return
    per_micro_batch = config.train.global_batch_size // micro_batches
    below = [n for n in range(micro_batches - 1, 0, -1) if _schedule_runs(schedule, pp, n)][:1]
    higher = range(micro_batches + 1, micro_batches + pp + 1)
    above = next(n for n in higher if _schedule_runs(schedule, pp, n))
    legal = " or ".join(str(n * per_micro_batch) for n in (*below, above))
    why = (
        f"at least parallel.pp = {pp} micro-batches a step"
        if schedule == "1f1b"
        else f"micro-batches in equal rounds of parallel.pp = {pp} or more"
    )
    raise ConfigError(
        f"{_place('train.global_batch_size', origins)}parallel.pipeline.schedule: {schedule} needs {why}, "
        f"not {micro_batches}; nearest legal train.global_batch_size: {legal}"
    )


def _schedule_runs(schedule: str, pp: int, micro_batches: int) -> bool:
    if schedule == "1f1b":
        return micro_batches >= pp
    return schedule == "zbv" or micro_batches % max(1, micro_batches // pp) == 0


def check_release(config: Config, micro_batches: int, *, origins: Mapping[str, Origin] | None = None) -> None:
    """Whether gradients may be released during backward.

    Raises:
        ConfigError: they add up over several micro-batches; names the legal global batch size.
    """
    if not config.train.gradient_release or micro_batches == 1:
        return
    one, whole = (
        config.train.global_batch_size // micro_batches,
        config.train.micro_batch_size * micro_batches,
    )
    raise ConfigError(
        f"{_place('train.gradient_release', origins)}train.gradient_release: true forgets gradients that are "
        f"complete, but here they add up over {micro_batches} micro-batches, so none is before the last: "
        f"write train.micro_batch_size: {whole} or train.global_batch_size: {one}, start {micro_batches} "
        "times the data-parallel ranks, or write train.gradient_release: false"
    )


def check_world(
    config: Config, world_size: int, *, origins: Mapping[str, Origin] | None = None
) -> tuple[int, int]:
    """All checks: ``(data-parallel ranks, micro-batches per rank and step)``.

    ``origins`` (of a :class:`~fp8train.config.resolve.ResolvedConfig`) lets messages name file and line.

    Raises:
        ConfigError: see :func:`data_parallel_size`, :func:`accumulation_steps`, :func:`check_pipeline` and
            :func:`check_release`; or a stage of the ramp or ``node_size`` does not divide; or a fault or a
            profile is for a rank that there is not.
    """
    dp = data_parallel_size(config, world_size, origins=origins)
    problems: list[str] = []
    micro_batches = 0
    with _noted(problems):
        micro_batches = accumulation_steps(config, dp, origins=origins)
        check_pipeline(config, micro_batches, origins=origins)
        check_release(config, micro_batches, origins=origins)
    with _noted(problems):
        _check_ramp(config, dp, origins)
    with _noted(problems):
        _check_nodes(config, dp, origins)
    with _noted(problems):
        _check_profile(config, world_size, origins)
    with _noted(problems):
        _check_faults(config, world_size, origins)
    if problems:
        raise ConfigError("\n".join(problems))
    return dp, micro_batches


def fewest_processes(config: Config) -> int:
    """The fewest processes that can run it.

    Raises:
        ConfigError: no number of processes can; says why the fewest that the layout has cannot.
    """
    dp, train = config.parallel.dp, config.train
    rounds = train.global_batch_size // train.micro_batch_size
    worst: ConfigError | None = None
    # The last: one round each, which interleaved schedules run too.
    for ranks in (*common_divisors(rounds), rounds) if dp == "auto" else (dp,):
        try:
            check_world(config, model_ranks(config) * ranks)
            return model_ranks(config) * ranks
        except ConfigError as error:
            worst = worst or error
    assert worst is not None
    raise worst


def world_problems(config: Config) -> Iterator[LayoutProblem]:
    """What no number of processes could run, as far as the file alone shows it."""
    batch = ("train.global_batch_size", "train.micro_batch_size")
    keys = (*batch, "parallel.pp") if config.parallel.dp == "auto" else ("parallel.dp", *batch)
    try:
        fewest_processes(config)
    except ConfigError as error:
        yield from (LayoutProblem(line, keys) for line in str(error).splitlines())


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Adds what is wrong to ``problems``, so that the next check can speak too."""
    try:
        yield
    except ConfigError as error:
        problems.append(str(error))


def _check_faults(config: Config, world_size: int, origins: Mapping[str, Origin] | None) -> None:
    """Whether there is the rank of every injected fault."""
    for fault in config.debug.fault_injection:
        if fault.rank != "all" and fault.rank >= world_size:
            raise ConfigError(
                f"{_place('debug.fault_injection', origins)}debug.fault_injection: {fault.kind} is for rank "
                f"{fault.rank}, but of {world_size} process{'es' if world_size > 1 else ''} the last is rank "
                f"{world_size - 1}"
            )


def _check_nodes(config: Config, dp: int, origins: Mapping[str, Origin] | None) -> None:
    """Whether nodes of ``node_size`` ranks divide those whose gradients add up."""
    gradient, ranks = config.precision.gradient, dp * config.parallel.cp
    size, key = gradient.fp8.node_size, "precision.gradient.fp8.node_size"
    if gradient.format == "high_precision" or size is None or ranks % size == 0:
        return
    legal = one_of([n for n in range(1, ranks + 1) if ranks % n == 0])
    raise ConfigError(
        f"{_place(key, origins)}{key} ({size}) must divide the data-parallel ranks ({ranks}); legal: {legal}"
    )


def _check_profile(config: Config, world_size: int, origins: Mapping[str, Origin] | None) -> None:
    """Whether there are the ranks that are to be profiled."""
    absent = [rank for rank in config.profile.ranks if rank >= world_size]
    if config.profile.start is not None and absent:
        there = f"ranks are 0 to {world_size - 1}" if world_size > 1 else "there is only rank 0"
        raise ConfigError(
            f"{_place('profile.ranks', origins)}profile.ranks names rank {absent[0]}, but {there}"
        )


def _check_ramp(config: Config, dp: int, origins: Mapping[str, Origin] | None) -> None:
    """Whether every stage of the ramp divides as the whole batch does."""
    unit, parallel = config.train.micro_batch_size * dp, config.parallel
    place = _place("train.batch_size_ramp", origins)
    for _, size in config.train.batch_sizes.ramp:
        rounds = size // unit
        fits = parallel.pp == 1 or _schedule_runs(parallel.pipeline.schedule, parallel.pp, rounds)
        if size % unit or not fits:
            more = (
                ""
                if fits
                else f", in numbers that parallel.pipeline.schedule: {parallel.pipeline.schedule} runs"
            )
            raise ConfigError(
                f"{place}train.batch_size_ramp: {size} samples must be a multiple of train.micro_batch_size "
                f"* dp = {config.train.micro_batch_size} * {dp} = {unit}{more}"
            )


def _place(key: str, origins: Mapping[str, Origin] | None) -> str:
    origin = (origins or {}).get(key)
    return f"{origin}: " if origin is not None and origin.explicit else ""
