"""Counts what one training step asks of a GPU, on tensors without values: launches, bytes, FLOPs, host
syncs, memory.

A :class:`StepCounter` is a dispatch mode: torch shows it every operation on the meta device, below autograd.
Views are free. A fused operation of the package declares its own cost; any other operation is one launch
that reads its inputs and writes its outputs once, with a few exceptions that are known to be several.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8train.kernels.fused_op import OPERATIONS, Cost
from tools.bench.ceilings import Gpu, Kind

DEVICE = "meta"
_PACKAGE = str(Path(__file__).parents[2] / "fp8train")
# fmt: off
_FREE = frozenset((
    "view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze", "as_strided",
    "detach", "_unsafe_view", "alias", "split", "unbind", "chunk", "view_as", "_reshape_alias", "narrow",
    "unfold", "lift_fresh", "diagonal", "split_with_sizes", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "is_same_size", "sym_size", "resize_", "set_",
    "_local_scalar_dense",
))
# fmt: on
_GEMMS = ("mm", "addmm", "addmm_", "_scaled_mm", "_scaled_mm_v2", "bmm", "baddbmm")
_WITHOUT_OLD = ("copy_", "fill_", "zero_")  # they overwrite what they do not read
_SEVERAL = {"_scaled_dot_product_flash_attention_backward": 3, "embedding_dense_backward": 4}
"""Launches of operations that are more than one: flash attention's backward prepares, works and converts;
the embedding's sorts indices first."""


@dataclass
class Row:
    """What operations of one place and kind add up to."""

    launches: int = 0
    moved: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, launches: int, moved: int, flops: int, seconds: float) -> None:
        """Add one operation."""
        self.launches += launches
        self.moved += moved
        self.flops += flops
        self.seconds += seconds


@dataclass(frozen=True)
class Place:
    """Where operations come from: phase of the step, kind, line of the package, and name of the operation."""

    phase: str
    kind: Kind
    line: str
    operation: str


@dataclass(frozen=True)
class Gemm:
    """One GEMM: shapes and strides of both operands, their types, and that of the result."""

    name: str
    a: str
    b: str
    out: str
    problem: str


@dataclass
class Counts:
    """What one step does; see the module.

    Attributes:
        rows: by place.
        gemms: how often each GEMM runs.
        syncs: lines where the host waits for the device, and how often.
        unrecordable: of these, and of copies from the host, those in what ``run.cuda_graphs`` records.
        peak: most live bytes by phase.
    """

    rows: dict[Place, Row] = field(default_factory=dict)
    gemms: Counter[Gemm] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    unrecordable: Counter[str] = field(default_factory=Counter)
    peak: dict[str, int] = field(default_factory=dict)

    def total(self, **wanted: str) -> Row:
        """The sum of the rows whose places have these values, such as ``kind="elementwise"``."""
        result = Row()
        for place, row in self.rows.items():
            if all(getattr(place, name) == value for name, value in wanted.items()):
                result.add(row.launches, row.moved, row.flops, row.seconds)
        return result

    def phases(self) -> list[str]:
        """In the order in which they were first seen."""
        return list(dict.fromkeys(place.phase for place in self.rows))


def bytes_of(tensor: Tensor) -> int:
    """Bytes that an operation touches of a tensor: repeated elements (stride 0) once."""
    result = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        result *= size if stride or not size else 1
    return result


def _is_meta(tensor: Tensor) -> bool:
    return tensor.device.type == DEVICE


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class StepCounter(TorchDispatchMode):
    """Counts operations on the meta device while it is active.

    Attributes:
        counts: so far, since :meth:`restart`.
        live: bytes of all storages that exist.
    """

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu, self.counts, self.live = gpu, Counts(), 0
        self._phase = ["build"]
        self._records = False
        self._seen: set[int] = set()

    def restart(self) -> None:
        """Forget what was counted; what is live stays."""
        self.counts = Counts()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside under this name."""
        self._phase.append(name)
        try:
            yield
        finally:
            self._phase.pop()

    def phased(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, counted under a name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which is to be recorded as a CUDA graph."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._records = True
            try:
                return function(*args, **kwargs)
            finally:
                self._records = False

        return call

    def _wait(self, what: str = "") -> None:
        self.counts.syncs[f"{_line()}{what}"] += 1
        self.counts.unrecordable[f"{_line()}{what}"] += self._records

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and take note of it."""
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        inputs = _tensors((args, kwargs))
        if name == "_local_scalar_dense" and _is_meta(args[0]):
            self._wait()
            return 1 if not args[0].is_floating_point() else 1.0
        if name == "_to_copy" and _is_meta(args[0]) and kwargs.get("device") == torch.device("cpu"):
            self._wait(" (copied to the host)")  # Tensor.tolist: there is nothing to copy
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        if not any(_is_meta(tensor) for tensor in (*inputs, *outputs)):
            return result
        for tensor in outputs:
            self._track(tensor)
        if name in _FREE:
            return result
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if _is_meta(source) and not _is_meta(outputs[0]):
                self._wait(" (copied to the host)")
            if self._records and not _is_meta(source):
                self.counts.unrecordable[f"{_line()} (copied from the host)"] += 1
        if (operation := OPERATIONS.get(f"{namespace}::{name}")) is not None:
            cost = operation.cost(args, result)
            self._note("elementwise", name, cost, 0)
            return result
        self._count(func, name, args, kwargs, inputs, outputs)
        return result

    def _count(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        if name in _WITHOUT_OLD:
            inputs = [tensor for tensor in inputs if tensor is not args[0]]
        given = [kwargs.get(arg.name) for arg in func._schema.arguments if arg.is_out]
        inputs = [tensor for tensor in inputs if all(tensor is not out for out in given)]
        read, written = (sum(map(bytes_of, filter(_is_meta, tensors))) for tensors in (inputs, outputs))
        kind: Kind = "elementwise"
        flops = 0
        if name in _GEMMS:
            operands = [tensor for tensor in inputs if tensor.dim() >= 2][-2:]
            a, b = operands if name not in ("_scaled_mm", "_scaled_mm_v2") else inputs[:2]
            kind = "gemm_fp8" if a.element_size() == 1 else "gemm_bf16"
            flops = 2 * a.numel() * b.shape[-1]
            self.counts.gemms[_gemm(name, a, b, outputs[0])] += 1
        elif "attention" in name:
            kind = "attention"
            query, key = (args[1], args[2]) if name.endswith("backward") else (args[0], args[1])
            flops = 4 * query.numel() * key.shape[-2] // 2  # causal: half of the square
            flops = flops * 5 // 2 if name.endswith("backward") else flops
        self._note(kind, name, Cost(_SEVERAL.get(name, 1), read, written), flops)

    def _note(self, kind: Kind, name: str, cost: Cost, flops: int) -> None:
        place = Place(self._phase[-1], kind, _line(), name)
        backward = name.endswith("backward")
        seconds = self.gpu.seconds(kind, cost.moved, flops, cost.launches, backward=backward)
        self.counts.rows.setdefault(place, Row()).add(cost.launches, cost.moved, flops, seconds)

    def _track(self, tensor: Tensor) -> None:
        """Count a storage as live until it is freed."""
        if not _is_meta(tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            weakref.finalize(storage, self._freed, key, size)
        phase = self._phase[-1]
        self.counts.peak[phase] = max(self.counts.peak.get(phase, 0), self.live)

    def elsewhere(self, tensor: Tensor) -> None:
        """Take a storage for memory of the host: it is not counted."""
        self._seen.add(tensor.untyped_storage()._cdata)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _line() -> str:
    """``layers/norm.py:44 forward``: the innermost line of the package on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and not file.endswith("fused_op.py"):
            return f"{file[len(_PACKAGE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


def _gemm(name: str, a: Tensor, b: Tensor, out: Tensor) -> Gemm:
    problem = ""
    if a.element_size() == 1:
        if not a.is_contiguous():
            problem = "A is not row-major"
        elif not b.t().is_contiguous():
            problem = "B is not column-major"
        elif a.shape[1] % 16 or b.shape[1] % 16:
            problem = "K and N must be multiples of 16"
    return Gemm(name, _describe(a), _describe(b), str(out.dtype).removeprefix("torch."), problem)


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{list(tensor.shape)} {dtype} strides {tuple(tensor.stride())}"
