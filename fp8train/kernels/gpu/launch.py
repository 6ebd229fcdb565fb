"""The one place where kernels are launched: counted, and compiled without a GPU, from here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.runtime.jit import JITFunction, mangle_type


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, and its arguments by name, options such as ``num_warps`` apart."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


_OBSERVER: ContextVar[Callable[[Launch], bool] | None] = ContextVar("launch_observer", default=None)
_OPTIONS = ("num_warps", "num_stages")


@contextmanager
def observed(observer: Callable[[Launch], bool]) -> Iterator[None]:
    """Show every launch to ``observer``, which says whether it is to happen."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def hardware() -> bool:
    """Whether kernels run on a GPU, whose own FP8 conversion they then use, and not in Triton's
    interpreter."""
    return not triton.knobs.runtime.interpret


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """Run ``kernel`` on a grid of programs.

    Products and sums are not fused into one rounding, as they are not in the references: the same bits.

    Args:
        kernel: decorated with ``triton.jit``.
        grid: programs, up to three dimensions; without any, nothing is launched.
        args: the kernel's parameters by position.
        named: the others, compile-time constants among them, and ``num_warps`` or ``num_stages``.
    """
    if 0 in grid:
        return
    observer = _OBSERVER.get()
    if observer is not None:
        options = {name: named[name] for name in _OPTIONS if name in named}
        names = [name for name in kernel.arg_names if name not in named]
        arguments = dict(zip(names, args, strict=False)) | {
            name: value for name, value in named.items() if name not in options
        }
        if not observer(Launch(kernel, grid, arguments, options)):
            return
    kernel[grid](*args, **named, enable_fp_fusion=False)


def compile_launch(seen: Launch, capability: int) -> Any:
    """Compile a launch for an NVIDIA GPU that need not be there; needs Triton without its interpreter.

    Args:
        seen: from :func:`observed`.
        capability: 90 for Hopper, 100 for Blackwell.

    Returns:
        Triton's compiled kernel, with ``asm`` and ``metadata``.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = seen.kernel
    assert isinstance(kernel, JITFunction), "Triton was imported with its interpreter"
    signature, constants, attributes = {}, {}, {}

    def describe(value: Any, path: tuple[int, ...], constant: bool) -> Any:
        """Triton's type of an argument; what is compiled in, or known of it, is noted under its path."""
        if constant or value is None or (type(value) is int and value == 1):  # as a launch would find it
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(part, (*path, place), False) for place, part in enumerate(value))
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):  # allocators align memory
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(value)

    for place, parameter in enumerate(kernel.params):
        value = seen.arguments.get(parameter.name, parameter.default)
        signature[parameter.name] = describe(value, (place,), parameter.is_constexpr)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {**seen.options, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
