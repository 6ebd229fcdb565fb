"""Running out of memory, as a message that says what to lower.

It is said in several ways: torch's CUDA allocator raises ``torch.OutOfMemoryError``, its CPU allocator a
plain ``RuntimeError`` ("can't allocate memory"), its C++ ``std::bad_alloc``, Python and NumPy
``MemoryError``, and the system ``OSError`` (ENOMEM: a file that cannot be mapped, say).
"""

from __future__ import annotations

import errno
import re
import resource

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _TEXT.search(str(error)) is not None


def explain(
    error: BaseException, config: Config, *, rank: int, dp: int, step: int | None
) -> OutOfMemoryError:
    """What to do about a failed allocation.

    Args:
        error: see :func:`is_out_of_memory`.
        config: of the run.
        rank: whose.
        dp: data-parallel ranks.
        step: the step under way, from 1; None before the first one.
    """
    where = "before the first step" if step is None else f"in step {step}"
    kind = "GPU" if isinstance(error, torch.OutOfMemoryError) or "cuda" in str(error).lower() else "CPU"
    size = _SIZE.search(str(error))
    asked = ""
    if size is not None:
        asked = f", asking for {format_bytes(int(size[1])) if size[2] == 'bytes' else f'{size[1]} {size[2]}'}"
    if kind == "CPU":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB, on Linux
        asked += f"; the most it ever held: {format_bytes(peak)}"
    return OutOfMemoryError(
        f"rank {rank} ran out of {kind} memory {where}{asked}\n{_remedy(config, dp, step, kind)}"
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
