"""Checks that need the number of processes, as plain arithmetic: usable before, and without, a process
group."""

from __future__ import annotations

from collections.abc import Mapping

from fp8train.config.errors import ConfigError
from fp8train.config.nodes import Origin
from fp8train.config.schema import Config


def data_parallel_size(
    config: Config, world_size: int, *, origins: Mapping[str, Origin] | None = None
) -> int:
    """Data-parallel ranks of a run with ``world_size`` processes.

    Raises:
        ConfigError: ``parallel.dp`` is a number other than the world size; states the formula and what would
            fit.
    """
    assert world_size >= 1
    dp = config.parallel.dp
    if dp == "auto" or dp == world_size:
        return world_size
    raise ConfigError(
        f"{_place('parallel.dp', origins)}parallel.dp ({dp}) must equal the number of processes "
        f"({world_size}): world size = dp; write parallel.dp: auto or {world_size}, or start {dp} processes "
        f"(torchrun --nproc-per-node={dp} on one node)"
    )


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


def check_world(
    config: Config, world_size: int, *, origins: Mapping[str, Origin] | None = None
) -> tuple[int, int]:
    """Both checks: ``(data-parallel ranks, micro-batches per rank and step)``.

    ``origins`` (of a :class:`~fp8train.config.resolve.ResolvedConfig`) lets messages name file and line.

    Raises:
        ConfigError: see :func:`data_parallel_size` and :func:`accumulation_steps`.
    """
    dp = data_parallel_size(config, world_size, origins=origins)
    return dp, accumulation_steps(config, dp, origins=origins)


def _place(key: str, origins: Mapping[str, Origin] | None) -> str:
    origin = (origins or {}).get(key)
    return f"{origin}: " if origin is not None and origin.explicit else ""
