"""NVIDIA apex for a CPU: the extension functions that we call, and nothing else.

Signatures, order of arguments, types and what is written where are those of ``csrc/amp_C_frontend.cpp``,
``csrc/multi_tensor_*.cu`` and ``csrc/layer_norm_cuda*`` at commit 6424da3 (July 2026). They were read, not
run. A call that the real one would refuse, or would take for something else (memory of another type), fails
here. Results are computed in float64 and rounded once. Nothing of fp8train is used here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.fakes import exact_norm

CHUNK = 2048 * 32
"""Of ``apex.multi_tensor_apply.multi_tensor_applier``."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Recorder:
    """The names of what was called, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []


def _integer(value: object) -> int:
    assert type(value) is int, f"an int is wanted, got {value!r}"
    return value


def _float(value: object) -> float:
    """As it arrives in C: FP32."""
    assert type(value) is float, f"a float is wanted, got {value!r}"
    return float(torch.tensor(value, dtype=torch.float32))


def _pointer(tensor: object, dtype: torch.dtype) -> Tensor:
    """A device scalar that is read through its address."""
    assert isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.numel() == 1, tensor
    return tensor


def _lists(lists: object, depth: int) -> list[list[Tensor]]:
    """What ``multi_tensor_apply<depth>`` checks, and what it does not: an empty tensor at the end of a list
    loses the launch."""
    assert isinstance(lists, list) and len(lists) == depth, "tensor_lists.size() != depth"
    assert all(isinstance(one, list) for one in lists) and lists[0], "tensor_lists[0].size() is not > 0"
    for one in lists:
        assert len(one) == len(lists[0]), "Size mismatch among tensor lists"
        for tensor, first in zip(one, lists[0], strict=True):
            assert tensor.is_contiguous(), "A tensor was not contiguous."
            assert tensor.device == lists[0][0].device
            assert tensor.numel() == first.numel(), "Size mismatch"
            assert tensor.numel(), "an empty tensor"
            assert tensor.numel() < 2**31
    return lists


def _all_in(tensors: Sequence[Tensor], *dtypes: torch.dtype) -> None:
    assert tensors[0].dtype in dtypes, tensors[0].dtype
    assert len({tensor.dtype for tensor in tensors}) == 1, "read as the first one's type"


class AmpC(ModuleType):
    """``amp_C``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__("amp_C")
        self._calls = recorder.calls

    def _begin(self, name: str, chunk_size: object, noop_flag: object) -> Tensor:
        self._calls.append(name)
        assert _integer(chunk_size) == CHUNK
        return _pointer(noop_flag, torch.int32)

    def multi_tensor_scale(
        self, chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
    ) -> None:
        flag = self._begin("multi_tensor_scale", chunk_size, noop_flag)
        sources, targets = _lists(tensor_lists, 2)
        _all_in(sources, *FLOATS)
        _all_in(targets, *FLOATS)
        for source, target in zip(sources, targets, strict=True):
            target.data.copy_(source.double() * _float(scale))
            if not source.isfinite().all():
                flag.fill_(1)

    def multi_tensor_l2norm(
        self,
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],
        per_tensor_python: bool | None,
    ) -> tuple[Tensor, Tensor]:
        flag = self._begin("multi_tensor_l2norm", chunk_size, noop_flag)
        assert per_tensor_python is None or type(per_tensor_python) is bool
        (tensors,) = _lists(tensor_lists, 1)
        _all_in(tensors, *FLOATS)
        squares = torch.stack([tensor.double().square().sum() for tensor in tensors])
        if not squares.float().isfinite().all():
            flag.fill_(1)
        norms = squares.sqrt().float() if per_tensor_python else torch.empty(0)
        return squares.sum().sqrt().float().reshape(1), norms

    def multi_tensor_adam_capturable(
        self,
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],
        lr: Tensor,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: Tensor,
        mode: int,
        bias_correction: int,
        weight_decay: float,
        inv_scale: Tensor,
    ) -> None:
        flag = self._begin("multi_tensor_adam_capturable", chunk_size, noop_flag)
        lists = _lists(tensor_lists, 4)
        _all_in([*lists[0], *lists[1]], *FLOATS)
        _all_in([*lists[2], *lists[3]], torch.float32)
        rate = _pointer(lr, torch.float32).double()
        beta1, beta2, epsilon, decay = map(_float, (beta1, beta2, epsilon, weight_decay))
        t, scale = int(_pointer(step, torch.int32)), _pointer(inv_scale, torch.float32).double()
        corrected = _integer(bias_correction) == 1
        correction1, correction2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
        if int(flag) == 1:
            return
        for g, p, m, v in zip(*lists, strict=True):
            grad, weight = g.double() * scale, p.double()
            g.data.copy_(grad)  # through addresses: no version of a tensor moves on
            if _integer(mode) == 0:
                grad = grad + decay * weight
            first = beta1 * m.double() + (1 - beta1) * grad
            second = beta2 * v.double() + (1 - beta2) * grad * grad
            update = first / correction1 / ((second / correction2).sqrt() + epsilon)
            if mode == 1:
                update = update + decay * weight
            p.data.copy_(weight - rate * update)
            m.data.copy_(first)
            v.data.copy_(second)


def _input(x: Tensor, normalized_shape: list[int], eps: float, *vectors: Tensor) -> None:
    assert isinstance(normalized_shape, list) and list(x.shape[-1:]) == normalized_shape and x.dim() == 2
    assert x.dtype in FLOATS and x.is_contiguous() and type(eps) is float
    for vector in vectors:
        assert vector.is_contiguous() and list(vector.shape) == normalized_shape
        assert vector.dtype == x.dtype, "read as the result's type, which is x's"


def _saved(dout: Tensor, x: Tensor, *statistics: Tensor, memory_efficient: bool) -> None:
    """What backward is handed; ``memory_efficient`` would make x the result."""
    assert memory_efficient is False
    assert dout.is_contiguous() and dout.dtype == x.dtype and dout.shape == x.shape
    for one in statistics:
        assert one.dtype == torch.float32 and one.shape == (len(x),) and one.is_contiguous()


class FusedLayerNormCuda(ModuleType):
    """``fused_layer_norm_cuda``; x is called ``input`` there, or ``input_or_output``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__("fused_layer_norm_cuda")
        self._calls = recorder.calls

    def forward(self, x: Tensor, normalized_shape: list[int], eps: float) -> list[Tensor]:
        self._calls.append("forward")
        _input(x, normalized_shape, eps)
        y, mean, invvar = exact_norm.forward(x, None, None, eps, centred=True)
        return [y.to(x.dtype), mean.float(), invvar.float()]

    def forward_affine(
        self, x: Tensor, normalized_shape: list[int], gamma: Tensor, beta: Tensor, eps: float
    ) -> list[Tensor]:
        self._calls.append("forward_affine")
        _input(x, normalized_shape, eps, gamma, beta)
        y, mean, invvar = exact_norm.forward(x, gamma, beta, eps, centred=True)
        return [y.to(x.dtype), mean.float(), invvar.float()]

    def backward(
        self,
        dout: Tensor,
        mean: Tensor,
        invvar: Tensor,
        x: Tensor,
        normalized_shape: list[int],
        eps: float,
        memory_efficient: bool,
    ) -> Tensor:
        self._calls.append("backward")
        _input(x, normalized_shape, eps)
        _saved(dout, x, mean, invvar, memory_efficient=memory_efficient)
        return exact_norm.backward(dout, x, mean, invvar, None)[0].to(x.dtype)

    def backward_affine(
        self,
        dout: Tensor,
        mean: Tensor,
        invvar: Tensor,
        x: Tensor,
        normalized_shape: list[int],
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        memory_efficient: bool,
    ) -> list[Tensor]:
        self._calls.append("backward_affine")
        _input(x, normalized_shape, eps, gamma, beta)
        _saved(dout, x, mean, invvar, memory_efficient=memory_efficient)
        return [g.to(x.dtype) for g in exact_norm.backward(dout, x, mean, invvar, gamma)]

    def rms_forward(self, x: Tensor, normalized_shape: list[int], eps: float) -> list[Tensor]:
        self._calls.append("rms_forward")
        _input(x, normalized_shape, eps)
        y, _, invvar = exact_norm.forward(x, None, None, eps, centred=False)
        return [y.to(x.dtype), invvar.float()]

    def rms_forward_affine(
        self, x: Tensor, normalized_shape: list[int], gamma: Tensor, eps: float
    ) -> list[Tensor]:
        self._calls.append("rms_forward_affine")
        _input(x, normalized_shape, eps, gamma)
        y, _, invvar = exact_norm.forward(x, gamma, None, eps, centred=False)
        return [y.to(x.dtype), invvar.float()]

    def rms_backward(
        self,
        dout: Tensor,
        invvar: Tensor,
        x: Tensor,
        normalized_shape: list[int],
        eps: float,
        memory_efficient: bool,
    ) -> Tensor:
        self._calls.append("rms_backward")
        _input(x, normalized_shape, eps)
        _saved(dout, x, invvar, memory_efficient=memory_efficient)
        return exact_norm.backward(dout, x, None, invvar, None)[0].to(x.dtype)

    def rms_backward_affine(
        self,
        dout: Tensor,
        invvar: Tensor,
        x: Tensor,
        normalized_shape: list[int],
        gamma: Tensor,
        eps: float,
        memory_efficient: bool,
    ) -> list[Tensor]:
        self._calls.append("rms_backward_affine")
        _input(x, normalized_shape, eps, gamma)
        _saved(dout, x, invvar, memory_efficient=memory_efficient)
        return [g.to(x.dtype) for g in exact_norm.backward(dout, x, None, invvar, gamma)[:2]]


def install(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Put both modules into ``sys.modules`` until the test ends. There is no package ``apex``: nothing of it
    is imported."""
    recorder = Recorder()
    for module in (AmpC(recorder), FusedLayerNormCuda(recorder)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "apex", None)
    return recorder
