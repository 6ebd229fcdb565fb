"""Whether what a run stores can be in this machine's memory at all, before anything is made.

A lower bound against an upper one, so that nothing that could run is refused: what is stored between steps,
by arithmetic (:mod:`fp8train.planning.rank_bytes`), and the input of one block; against all memory and swap,
or less where a container, Slurm or ``ulimit -v`` says so. Without this a run too large for its machine is
busy for minutes, until an allocation fails or the kernel kills it without a word. The memory of GPUs is left
to them: they refuse at the first allocation (:mod:`fp8train.training.memory`).
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fp8train.config.environment import World
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.live.console import format_bytes
from fp8train.planning.rank_bytes import RankBytes

_NVIDIA = Path("/proc/driver/nvidia")
_ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}


def check_room(
    config: Config, world: World, vocab_size: int, *, dp: int, micro_batches: int, have: int | None = None
) -> None:
    """Refuse what this machine's memory cannot hold.

    Args:
        config: of the run.
        world: this process among the others.
        vocab_size: of the data.
        dp: data-parallel ranks.
        micro_batches: of a step, on a rank.
        have: bytes of memory; None: this machine's.

    Raises:
        ConfigError: it is too small.
    """
    stored = RankBytes(config, vocab_size, dp=dp, micro_batches=micro_batches).largest()
    parallel, model = config.parallel, config.model
    needed = stored.model.on_host
    if config.run.device == "cpu" or (config.run.device == "auto" and not _NVIDIA.is_dir()):
        tokens = config.train.micro_batch_size * config.data.seq_length // (parallel.cp * parallel.tp)
        needed = stored.model.total + tokens * model.hidden_size * _ITEMSIZE[config.precision.compute]
    alike = parallel.pp == 1 and parallel.zero == "none"  # else the largest rank's may be larger than others'
    ranks = world.local_size if alike else 1
    of_process, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= of_process < needed:
        ranks, have = 1, of_process
    have = memory_of_machine() if have is None else have
    if needed * ranks <= have:
        return
    whose = "a rank" if ranks == 1 else f"{ranks} ranks"
    raise ConfigError(
        f"weights, gradients and optimizer states of {whose} take {format_bytes(needed * ranks)} at least, "
        f"and this machine gives {format_bytes(have)} of memory\n"
        f"the model has model.num_layers={model.num_layers}, model.hidden_size={model.hidden_size}, "
        f"model.ffn_hidden_size={model.ffn_hidden_size} and a vocabulary of {vocab_size}, a micro-batch "
        f"{config.train.micro_batch_size} x {config.data.seq_length} tokens\n"
        "take less of one of them, or more machines with parallel.tp, parallel.pp or parallel.zero: 1"
    )


def memory_of_machine() -> int:
    """Bytes that processes here can have, swap included; as much as there could be where nothing tells."""
    return min(_limits(), default=2**63)


def _limits() -> Iterator[int]:
    swap = 0
    with suppress(OSError, ValueError, LookupError):
        sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        swap = int(sizes["SwapTotal"].split()[0]) * 1024
        yield int(sizes["MemTotal"].split()[0]) * 1024 + swap
    for folder in _control_groups():
        with suppress(OSError, ValueError):
            yield int((folder / "memory.max").read_text()) + swap  # "max" is no number, and no limit


def _control_groups(root: Path = Path("/sys/fs/cgroup")) -> Iterator[Path]:
    """The folders of this process's control group (version 2) and those above it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                inner = root / line[4:]
                yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))
