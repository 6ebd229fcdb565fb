"""Running out of memory, as a message that says what to lower.

It is said in several ways: torch's CUDA allocator raises ``torch.OutOfMemoryError``, its CPU allocator a
plain ``RuntimeError`` ("can't allocate memory"), its C++ ``std::bad_alloc``, Python and NumPy
``MemoryError``, and the system ``OSError`` (ENOMEM: a file that cannot be mapped, say).

Of a GPU there is more to tell: what its allocator holds goes into the message as a line, into the rank's log
as a table, and into a snapshot that torch's viewer draws. It is taken when the error has come up to the run,
whose frames it still holds, and so most of their tensors.
"""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fp8train.config.errors import UserError
from fp8train.config.schema import Config
from fp8train.live.console import format_bytes

_TEXT = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|CUDA error: out of memory|cuda out of memory",
    re.IGNORECASE,
)
_SIZE = re.compile(r"(?:tried|unable) to allocate (\d+(?:\.\d+)?) (bytes|[KMGTP]i?B)", re.IGNORECASE)


class OutOfMemoryError(UserError):
    """The run needs more memory than this machine gives."""


class Allocator(Protocol):
    """What is asked of ``torch.cuda.memory``."""

    memory_stats: Callable[[], Mapping[str, Any]]
    mem_get_info: Callable[[], tuple[int, int]]
    memory_summary: Callable[[], str]
    _dump_snapshot: Callable[[str], None]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _TEXT.search(str(error)) is not None


def _is_on_gpu(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "cuda" in str(error).lower()


def keep_snapshot(
    error: BaseException,
    directory: Path,
    *,
    rank: int,
    log: Callable[[str], None],
    allocator: Allocator | None = None,
) -> str:
    """Keep what the GPU's allocator held, as ``oom_rankN.pickle`` in ``directory`` and as a table in the log.

    Args:
        error: see :func:`is_out_of_memory`; nothing is kept of one that is not a GPU's.
        directory: made where it is not there.
        rank: whose.
        log: takes the table.
        allocator: default: ``torch.cuda.memory``.

    Returns:
        Lines for the message, each ending it with a newline before it; empty where there is nothing to tell.
        Never raises: the error that is being explained matters more.
    """
    if not _is_on_gpu(error):
        return ""
    said = ""
    try:
        source: Any = torch.cuda.memory if allocator is None else allocator
        said = f"\n{_held(source)}"
        log(source.memory_summary())
        directory.mkdir(exist_ok=True)
        path = directory / f"oom_rank{rank}.pickle"
        source._dump_snapshot(str(path))
        said += f"\nsnapshot of the memory: {path}, for https://docs.pytorch.org/memory_viz"
    except Exception as problem:  # a context that is broken, a disk that is full
        log(f"no snapshot of the memory: {type(problem).__name__}: {problem}")
    return said


def _held(allocator: Any) -> str:
    """A line about what the allocator holds, and what to do where much of it is in unusable pieces."""
    stats = allocator.memory_stats()
    free, total = allocator.mem_get_info()
    allocated, most, reserved, split = (
        stats.get(f"{name}_bytes.{pool}", 0)
        for name, pool in (
            ("allocated", "all.current"),
            ("allocated", "all.peak"),
            ("reserved", "all.current"),
            ("inactive_split", "all.current"),
        )
    )
    text = (
        f"the allocator holds {format_bytes(reserved)}: {format_bytes(allocated)} in use (at most "
        f"{format_bytes(most)}), {format_bytes(split)} in pieces between; the device has "
        f"{format_bytes(free)} of {format_bytes(total)} free"
    )
    if split > reserved / 10:
        text += (
            "; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment makes use of the pieces"
        )
    return text


def explain(
    error: BaseException, config: Config, *, rank: int, dp: int, step: int | None, held: str = ""
) -> OutOfMemoryError:
    """What to do about a failed allocation.

    Args:
        error: see :func:`is_out_of_memory`.
        config: of the run.
        rank: whose.
        dp: data-parallel ranks.
        step: the step under way, from 1; None before the first one.
        held: of :func:`keep_snapshot`.
    """
    where = "before the first step" if step is None else f"in step {step}"
    kind = "GPU" if _is_on_gpu(error) else "CPU"
    size = _SIZE.search(str(error))
    asked = ""
    if size is not None:
        asked = f", asking for {format_bytes(int(size[1])) if size[2] == 'bytes' else f'{size[1]} {size[2]}'}"
    if kind == "CPU":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB, on Linux
        asked += f"; the most it ever held: {format_bytes(peak)}"
    return OutOfMemoryError(
        f"rank {rank} ran out of {kind} memory {where}{asked}{held}\n{_remedy(config, dp, step, kind)}"
    )


def _remedy(config: Config, dp: int, step: int | None, kind: str) -> str:
    """Settings that would need less, the cheapest first; what is lowest already is left out."""
    train, parallel = config.train, config.parallel
    ways = []
    if step is not None and train.micro_batch_size > 1:
        ways.append(f"lower train.micro_batch_size ({train.micro_batch_size})")
    if step is not None and train.activation_checkpointing != "full":
        stronger = "full" if train.activation_checkpointing == "selective" else "selective or full"
        ways.append(f"recompute with train.activation_checkpointing: {stronger}")
    if parallel.zero == "none" and dp > 1:
        ways.append("share the optimizer's states with parallel.zero: 1")
    if config.optimizer.offload == "none" and kind == "GPU":
        ways.append("keep the optimizer's states in host memory with optimizer.offload: cpu")
    if config.precision.level in ("O0", "O1"):
        ways.append(f"keep states in fewer bits with precision.level: O2 ({config.precision.level})")
    ways.append(f"split the model further with parallel.tp ({parallel.tp}) or parallel.pp ({parallel.pp})")
    return f"{', '.join(ways)}, or take a smaller model"
