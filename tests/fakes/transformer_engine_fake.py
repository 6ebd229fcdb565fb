"""A Transformer Engine for a CPU: the classes and functions that we call, and nothing else.

Each call is checked for what the real one needs (layouts, types, shapes and strides of codes and scales), and
computes in float64 from the bytes that it was handed: codes by the bits of their format, scales as what
decoding multiplies by. Nothing of fp8train is used here. :func:`install` puts it into ``sys.modules`` for one
test, with the parts that it needs: functions that say what goes into which module.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class DType(enum.IntEnum):
    """As ``transformer_engine.pytorch.DType``: FP8 data is bytes with one of these beside it."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TE_DType = {
    torch.uint8: DType.kByte,
    torch.float8_e4m3fn: DType.kFloat8E4M3,
    torch.float8_e5m2: DType.kFloat8E5M2,
    torch.int32: DType.kInt32,
    torch.float32: DType.kFloat32,
    torch.float16: DType.kFloat16,
    torch.bfloat16: DType.kBFloat16,
}


def decode(data: Tensor, dtype: DType) -> Tensor:
    """Float64 values of FP8 codes, by sign, exponent and mantissa (OCP OFP8)."""
    assert data.dtype == torch.uint8, f"data must be bytes, got {data.dtype}"
    mantissa_bits, bias = (3, 7) if dtype == DType.kFloat8E4M3 else (2, 15)
    code = data.to(torch.int64)
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)).double() / 2**mantissa_bits
    value = torch.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias)
    )
    if dtype == DType.kFloat8E4M3:
        value[(code & 0x7F) == 0x7F] = torch.nan
    else:
        value[(code & 0x7F) == 0x7C] = torch.inf
        value[(code & 0x7F) > 0x7C] = torch.nan
    return torch.where(code >= 128, -value, value)


class Recorder:
    """What was called, in order, by name: for tests that ask whether it was."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.arguments: list[dict[str, Any]] = []
        self.capability = (9, 0)

    def note(self, name: str, **arguments: Any) -> None:
        self.calls.append(name)
        self.arguments.append(arguments)


Part = Callable[[Recorder], dict[str, dict[str, Any]]]
"""Gives what to put into which module, ``{"pytorch.tensor": {"Float8Quantizer": ...}}``."""


def _constants(recorder: Recorder) -> dict[str, dict[str, Any]]:
    return {
        "": {"__version__": "2.20.2"},
        "pytorch": {"DType": DType},
        "pytorch.constants": {"TE_DType": TE_DType},
    }


def install(monkeypatch: pytest.MonkeyPatch, *parts: Part, capability: tuple[int, int] = (9, 0)) -> Recorder:
    """Put the fake into ``sys.modules`` until the test ends, on a device of this compute capability."""
    recorder = Recorder()
    recorder.capability = capability
    modules: dict[str, ModuleType] = {}
    for part in (_constants, *parts):
        for path, members in part(recorder).items():
            names = ["transformer_engine", *(path.split(".") if path else [])]
            for depth in range(1, len(names) + 1):
                full = ".".join(names[:depth])
                if full not in modules:
                    modules[full] = ModuleType(full)
                    modules[full].__path__ = []  # type: ignore[attr-defined]
                    if depth > 1:
                        setattr(modules[".".join(names[: depth - 1])], names[depth - 1], modules[full])
            for name, member in members.items():
                setattr(modules[".".join(names)], name, member)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "fake device")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return recorder
