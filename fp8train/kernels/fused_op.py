"""Operations that a GPU does in one launch or two of our own, and everything else in torch's.

An operation is declared once: its *reference*, which is plain torch and the definition of its result; its
Triton *launcher*, which gives the same codes; the shapes of its results; and its *cost*, what the launcher
reads and writes, which ``tools/bench/count_step.py`` counts without a GPU. Who calls it does not choose:

=================  ==========================================================================
tensors are on     what runs
=================  ==========================================================================
CPU                the reference
CUDA               the launcher; where there is no Triton, the reference
meta, or fake      nothing; results have the right shapes
=================  ==========================================================================

Operations are registered with torch (``fp8train::NAME``), so a compiler sees one opaque operator each.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What a launcher costs: kernel ``launches``, and bytes of device memory ``read`` and ``written``."""

    launches: int
    read: int
    written: int

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.read + self.written


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; torch for CUDA brings it."""
    return importlib.util.find_spec("triton") is not None


def fuses(x: Tensor) -> bool:
    """Whether work on ``x`` is to be done by fused operations: anywhere but on a CPU, whose caches like
    chains of small operations better."""
    return x.device.type != "cpu"


def fuses_now(x: Tensor) -> bool:
    """Whether a layer's work on ``x`` is to be done by fused operations: where :func:`fuses` says so, outside
    of compiled graphs, whose compiler fuses itself, and not in FP64."""
    return fuses(x) and not torch.compiler.is_compiling() and x.dtype != torch.float64


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of these tensors together; None is nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class FusedOp:
    """One operation with its implementations; call it with positional arguments, as the reference.

    Attributes:
        name: in torch's registry, after ``fp8train::``.
        reference: plain torch.
        cost: ``cost(arguments, results)`` of the launcher, from the tuple of arguments and what came out.
        fake: gives empty results of the right shapes.
        mutates: names of arguments that are written in place.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        *,
        launcher: str,
        fake: Callable[..., Any],
        cost: Callable[[tuple[Any, ...], Any], Cost],
        mutates: Sequence[str] = (),
    ) -> None:
        """Declare and register.

        Args:
            reference: annotated as :func:`torch.library.infer_schema` asks; named as the operation.
            launcher: ``module:function`` of the Triton launcher, imported when it is first needed.
            fake: returns empty results for arguments without values.
            cost: see the class.
            mutates: arguments that are written in place.
        """
        self.name, self.reference, self.cost = reference.__name__.lstrip("_"), reference, cost
        self.fake, self.mutates = fake, tuple(mutates)
        self._launcher = launcher
        qualified = f"fp8train::{self.name}"
        # As torch.library.custom_op would, but for its Python layers: those cost 0.1 ms a call.
        torch.library.define(qualified, torch.library.infer_schema(reference, mutates_args=tuple(mutates)))
        torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
        torch.library.impl(qualified, "CUDA", self._on_gpu)
        torch.library.register_fake(qualified, fake)
        self._op = getattr(torch.ops.fp8train, self.name).default
        OPERATIONS[qualified] = self

    def _on_gpu(self, *args: Any) -> Any:
        if not has_triton():
            return self.reference(*args)
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            return self.launch(*args)

    def launch(self, *args: Any) -> Any:
        """Run the Triton launcher, whatever the device: for tests under Triton's interpreter."""
        module, _, function = self._launcher.partition(":")
        return getattr(importlib.import_module(module), function)(*args)

    def __call__(self, *args: Any) -> Any:
        """Run what the tensors' device asks for."""
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type == "cpu" and not torch.compiler.is_compiling():
            return self.reference(*args)
        return self._op(*args)


OPERATIONS: dict[str, FusedOp] = {}
"""All operations by their name in torch's registry; filled where they are declared."""
