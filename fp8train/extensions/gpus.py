"""The GPUs that a process may use, asked of NVIDIA's management library: without torch, which takes seconds
to import, and without a CUDA context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96


@dataclass(frozen=True)
class Gpu:
    """One GPU: its ``name`` and compute ``capability``, (major, minor)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def visible_gpus(
    environment: Mapping[str, str] = os.environ, load: Callable[[str], Any] = ctypes.CDLL
) -> list[Gpu] | None:
    """The GPUs of this machine that ``CUDA_VISIBLE_DEVICES`` leaves; all of them where it names them in a way
    that is not a list of numbers. None where NVIDIA's library is not there or does not answer."""
    try:
        library = load(_LIBRARY)
    except OSError:
        return None
    if library.nvmlInit_v2() != 0:
        return None
    try:
        gpus = _all(library)
    finally:
        library.nvmlShutdown()
    if gpus is None or (listed := environment.get("CUDA_VISIBLE_DEVICES")) is None:
        return gpus
    numbers = [part.strip() for part in listed.split(",") if part.strip()]
    if not all(number.isdigit() for number in numbers):
        return gpus
    return [gpus[int(number)] for number in numbers if int(number) < len(gpus)]


def _all(library: Any) -> list[Gpu] | None:
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None
    gpus = []
    for index in range(count.value):
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
        major, minor = ctypes.c_int(), ctypes.c_int()
        answers = (
            library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)),
            library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES)),
            library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)),
        )
        if any(answers):
            return None
        gpus.append(Gpu(name.value.decode(errors="replace"), (major.value, minor.value)))
    return gpus
