"""What injected faults do: to this process, to its disk, to the numbers of its model.

Each is the fault itself, not its symptom: a process that is killed is killed by the kernel, a full disk is
full, NaN comes out of a module. Faults that last return how they end.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.config.debug_schema import FaultConfig
from fp8train.config.errors import ConfigError
from fp8train.step.base_trainer import BaseTrainer
from fp8train.step.consistency import replicated_tensors

LARGEST_DISK = 1 << 30
"""Bytes that ``disk_full`` fills at most: a larger disk may be someone's."""
FILLER_FILE = "filler"
"""Takes all the room there is, in the folder of the faults."""

End = Callable[[], None]


class InjectedFaultError(RuntimeError):
    """The exception of ``kind: exception``."""


def strike_process(fault: FaultConfig) -> None:
    """What happens to this process. Many kinds do not return."""
    seconds = fault.seconds or 0.0
    match fault.kind:
        case "exception":
            raise InjectedFaultError(f"injected fault: {fault}")
        case "sigterm" | "sigint" | "sigkill" | "sigstop":
            os.kill(os.getpid(), signal.Signals[fault.kind.upper()])
        case "exit":
            os._exit(1 if fault.status is None else fault.status)
        case "segfault":
            ctypes.string_at(0)
        case "hang":
            while True:
                time.sleep(3600)
        case "sleep" | "slow":
            time.sleep(seconds)
        case "gil":  # PyDLL calls keep the interpreter's lock
            ctypes.PyDLL(None).usleep(ctypes.c_uint(int(seconds * 1e6)))
        case "oom_host":
            torch.empty(1 << 62, dtype=torch.uint8)
        case _:
            raise AssertionError(fault.kind)


def fill_disk(folder: Path) -> End:
    """Leave not one free byte on the disk of ``folder``.

    Raises:
        ConfigError: it is so large that it is hardly one for tests.
    """
    free = shutil.disk_usage(folder).free
    if free > LARGEST_DISK:
        raise ConfigError(
            f"debug.fault_injection: disk_full would fill the disk of {folder}, which has "
            f"{free / 2**30:,.0f} GiB free and may serve others\n"
            "put run.dir on a small one, for example: mount -t tmpfs -o size=64m tmpfs DIRECTORY"
        )
    filler = folder / FILLER_FILE
    with filler.open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            block = b"\0" * size
            try:
                while stream.write(block) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return lambda: filler.unlink(missing_ok=True)


def find_module(fault: FaultConfig, model: nn.Module) -> nn.Module:
    """The module whose output a fault is about.

    Raises:
        ConfigError: this rank has none of that name.
    """
    path, modules = _path(fault), dict(model.named_modules())
    if path not in modules:
        raise ConfigError(
            f"debug.fault_injection: {fault}: this rank has no module {path}; it has, for example, "
            f"{', '.join(list(modules)[1:5])}"
        )
    return modules[path]


def bend(fault: FaultConfig, model: nn.Module) -> End:
    """Change what a module puts out in each forward pass, or its gradient in each backward pass, until the
    returned function is called; that one says so if the module did not run at all.

    Raises:
        ConfigError: there is no such module, channel, element or bit.
    """
    path, calls = _path(fault), 0

    def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"debug.fault_injection: {fault}: {path} puts out no tensor; choose another module"
            )
        return _bent(fault, output)

    handle = find_module(fault, model).register_forward_hook(hook)

    def end() -> None:
        handle.remove()
        if not calls:
            raise ConfigError(
                f"debug.fault_injection: {fault}: {path} did not run as a module of its own in this step "
                "(functions may be fused on this device); name embedding or final_norm"
            )

    return end


def _path(fault: FaultConfig) -> str:
    return fault.name or "final_norm"


def _bent(fault: FaultConfig, output: Tensor) -> Tensor:
    if fault.kind == "nan_loss":
        return output * torch.nan
    if fault.kind == "outlier_channel":
        factors = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        factors[_index(fault, "channel", output.shape[-1])] = 1000.0 if fault.factor is None else fault.factor
        return output * factors
    if not output.requires_grad:
        return output

    def gradient(grad: Tensor) -> Tensor:
        if fault.kind == "nan_gradient":
            return grad * torch.nan
        flipped = grad.clone(memory_format=torch.contiguous_format)
        flip_bit(fault, flipped)
        return flipped

    output.register_hook(gradient)
    return output


def find_tensor(fault: FaultConfig, trainer: BaseTrainer) -> Tensor:
    """The tensor that ``bit_flip_weight`` is about, as this rank holds it.

    Raises:
        ConfigError: there is none of that name.
    """
    tensors = trainer.state_tensors() | replicated_tensors(trainer)[0]
    if fault.name not in tensors:
        raise ConfigError(
            f"debug.fault_injection: {fault}: this rank has no tensor {fault.name}; it has, for example, "
            f"{', '.join(list(tensors)[:2] + list(tensors)[-2:])}"
        )
    return tensors[fault.name].detach()


def flip_bit(fault: FaultConfig, tensor: Tensor) -> None:
    """Flip one bit of one element in place. Bits count from the lowest of the element."""
    width = tensor.element_size()
    element = _index(fault, "element", tensor.numel())
    bit = _index(fault, "bit", 8 * width)
    assert tensor.is_contiguous()
    data = tensor.view(-1).view(torch.uint8)
    data[element * width + bit // 8] ^= 1 << bit % 8  # little-endian, as every machine that torch runs on


def _index(fault: FaultConfig, name: str, size: int) -> int:
    index: int = getattr(fault, name) or 0
    if index >= size:
        raise ConfigError(f"debug.fault_injection: {fault}: {name} is {index}, but there are {size}")
    return index
