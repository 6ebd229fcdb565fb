"""A recorder with the semantics of a CUDA graph, for a CPU.

Of what runs while it records it keeps every operation with its very tensors and the numbers that Python gave
it; a replay runs them again on these tensors and puts results where they were. So what Python would do
differently by now is not done, and a tensor that was replaced by another keeps its old values. As a capture,
recording changes nothing: memory that existed gets its content back, and what was made holds NaN until a
replay. What a capture forbids raises :class:`NotRecordable`; so does a replay that reads memory which nobody
else holds any more, where a graph would read whatever is there by then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fp8train.kernels import fused_op, gemm
from fp8train.kernels.fused_op import FusedOp
from fp8train.layers import fp8_weight, grad_weight_op, loss
from fp8train.numerics import stochastic
from fp8train.optim import publishing
from fp8train.parallel.gradients import block_storage, held
from fp8train.step.recorded import Recording

_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
_WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")
_LOOKS = ("tolist", "numpy", "cpu")  # which a dispatch mode does not see on a CPU
_COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy)
_RANDOM = ("rand", "randn", "randint", "normal_", "uniform_", "bernoulli_", "random_", "randperm")
_HANDS_OVER = {
    grad_weight_op.contribute_grad_weight: grad_weight_op._contribute_grad_weight,
    grad_weight_op.contribute_grad_weight_fp8: grad_weight_op._contribute_grad_weight_fp8,
}
"""Operators that only call Python: what is launched are the operations within."""
_SLOT = 3, 5
"""Position of their slot, a tensor of the host."""


class NotRecordable(Exception):
    """What a CUDA graph cannot hold."""


class _NoLooks(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (name := getattr(func, "__name__", "")) in _LOOKS:
            raise NotRecordable(f"the host waits for values: {name}")
        if func in _COPIES:
            raise NotRecordable(f"a tensor of host memory is copied to the device: {name}")
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _references(key: int) -> int:
    return torch._C._storage_Use_Count(key)  # type: ignore[attr-defined,no-any-return]


_ONE = torch.ones(1)
_UNUSED = _references(_key(_ONE)) - 1
"""References to memory that no tensor has: torch counts the storage's Python object."""


def _alias(leaf: Any) -> Any:
    """The same memory, in a tensor that nobody else can point elsewhere."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


class _Operations(TorchDispatchMode):
    """Runs and keeps operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._made: dict[int, torch.UntypedStorage] = {}
        self._given: Counter[int] = Counter()  # references of ours to memory that existed before
        self._numbers: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _HANDS_OVER:
            place = _SLOT[func is grad_weight_op.contribute_grad_weight_fp8]
            args = (*args[:place], int(args[place]), *args[place + 1 :])
            with self:
                return _HANDS_OVER[func](*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        self._check(name, args)
        written = self._written(func, args, kwargs)
        for tensor in written:
            if _key(tensor) not in self._made and _key(tensor) not in self._before:
                storage = tensor.untyped_storage()
                self._before[_key(tensor)] = storage, _bytes_of(storage).clone()
        with torch._C.DisableTorchFunction():
            result = func(*args, **kwargs)
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [tensor for tensor in _tensors(result) if _key(tensor) not in given]
        if name == "lift_fresh":
            self._numbers |= given
        for tensor in fresh:
            self._made[_key(tensor)] = tensor.untyped_storage()
        if (written or fresh) and name not in _EMPTY:
            own_args, own_kwargs = tree_map(_alias, (args, kwargs))
            outputs = [None if _key(tensor) in given else _alias(tensor) for tensor in _tensors(result)]
            self.calls.append((func, own_args, own_kwargs, outputs))
            keys = map(_key, _tensors((own_args, own_kwargs)))
            self._given.update(key for key in keys if key not in self._made and key not in self._numbers)
        return result

    def _check(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _WAITS:
            raise NotRecordable(f"the host waits for values: {name}")
        if name == "lift_fresh" and args[0].dim():  # what is assigned to elements may be a number
            raise NotRecordable("a tensor of host memory is copied to the device")
        if name in _RANDOM:
            raise NotRecordable(f"random numbers: {name}")
        if name.startswith("index") and any(t.dtype == torch.bool for t in _tensors(args[1:2])):
            raise NotRecordable(f"the shape depends on values: {name} with a mask")

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        found = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
        return found

    def undo(self) -> None:
        """As if nothing had run."""
        for storage, content in self._before.values():
            _bytes_of(storage).copy_(content)
        for storage in self._made.values():
            _bytes_of(storage).fill_(0xFF)
        self._before.clear()
        self._made.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for key, ours in self._given.items():
            if _references(key) - ours <= _UNUSED:
                raise NotRecordable("memory that was recorded is free by now")
        for func, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    assert old.shape == new.shape, f"{func}: {old.shape}, then {new.shape}"
                    old.copy_(new)


class GraphRecorder:
    """A :class:`fp8train.step.recorded.Recorder`.

    Attributes:
        made: operations of each recording.
        dropped: how often recordings were dropped.
    """

    def __init__(self) -> None:
        self.made: list[int] = []
        self.dropped = 0

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> Recording:
        operations = _Operations()
        with _NoLooks(), operations:
            result = function()
        operations.undo()
        self.made.append(len(operations.calls))
        return Recording(result, operations.replay)

    def drop(self) -> None:
        self.dropped += 1


@contextmanager
def launched(*, fuse: bool) -> Iterator[None]:
    """What is one launch on a GPU is one operation here: FP8 GEMMs, which a CPU decodes with a look at their
    scales; and with ``fuse`` a GPU's branches of layers, store and optimizer, with the references of fused
    operations."""

    def one_operation(self: FusedOp, *args: Any) -> Any:
        return self._op(*args)

    with patch.object(gemm, "_fp8_gemm", gemm._fp8_gemm_op):
        if not fuse:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(patch.object(FusedOp, "__call__", one_operation))
            stack.enter_context(patch.object(stochastic, "_on_cpu", lambda x: False))
            for user in (fused_op, block_storage, held, loss, fp8_weight, publishing):
                stack.enter_context(patch.object(user, "fuses", lambda x: True))
            yield
