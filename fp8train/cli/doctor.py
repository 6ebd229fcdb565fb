"""``fp8train doctor``: what this machine can run, and why not.

Each check looks at one thing and says what it means for a run; the FP8 product and the all-reduce are really
done, because a library that imports may still not work. Only checks that a CPU run depends on make the exit
status 1: everything else is a matter of what the machine is for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from fp8train import __version__, kernels
from fp8train.extensions.catalogue import EXTENSIONS, Extension, Find, find, has_module
from fp8train.extensions.gpus import Gpu, visible_gpus
from fp8train.kernels.attention import AttentionCall, choose_attention_backend
from fp8train.kernels.fused_op import OPERATIONS, has_triton
from fp8train.live.console import format_bytes

Status = Literal["ok", "limited", "missing", "broken"]

_FP8_CAPABILITY = (8, 9)
_FP8_REDUCING_NCCL = (2, 24, 3)
_DRIVERS = {11: 450, 12: 525, 13: 580}
"""The oldest NVIDIA driver for each major version of CUDA (release notes of the CUDA toolkit)."""


@dataclass(frozen=True)
class Finding:
    """One line of the report on this machine."""

    item: str
    """What was looked at."""
    status: Status
    """``broken`` is the only one that a run on this machine cannot do with."""
    explanation: str
    """What it means."""


def doctor() -> int:
    """Examine the machine and print the report.

    Returns:
        0, or 1 if something is broken that every run needs.
    """
    findings = examine()
    print(table(findings))
    broken = [finding.item for finding in findings if finding.status == "broken"]
    if broken:
        print(f"\nNot able to train: {', '.join(broken)}")
        return 1
    kind = "CUDA" if torch.cuda.is_available() else "CPU"
    print(f"\nAble to train on {kind}.")
    return 0


def examine() -> list[Finding]:
    """All findings, in the order of the report."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _software,
        _cpu,
        _gpus,
        _matmul,
        _attention,
        _fused_kernels,
        _collectives,
        _optional_libraries,
        _space,
    )
    return [finding for check in checks for finding in check()]


def table(findings: list[Finding]) -> str:
    """Format findings as aligned plain text."""
    item = max(len(finding.item) for finding in findings)
    status = max(len(finding.status) for finding in findings)
    return "\n".join(f"{f.item:<{item}}  {f.status:<{status}}  {f.explanation}" for f in findings)


def _software() -> Iterator[Finding]:
    yield Finding("fp8train", "ok", __version__)
    old = sys.version_info < (3, 11)
    yield Finding(
        "Python",
        "broken" if old else "ok",
        platform.python_version() + (" is older than 3.11" if old else ""),
    )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    old = version < (2, 11)
    yield Finding(
        "PyTorch", "limited" if old else "ok", torch.__version__ + (" is older than 2.11" if old else "")
    )


def _cpu() -> Iterator[Finding]:
    flags = cpu_flags()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    yield Finding(
        "CPU BF16",
        "ok" if fast else "limited",
        f"in hardware ({', '.join(fast)})"
        if fast
        else "no amx_bf16 or avx512_bf16: emulated, slower than FP32",
    )
    usable = len(os.sched_getaffinity(0))
    yield Finding("CPU threads", "ok", f"{torch.get_num_threads()} of torch, {usable} usable cores")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction-set flags of the first processor; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def driver_version(version: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver's kernel module, ``580.65.06``; None where there is none."""
    try:
        found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", version.read_text() + "\n", re.MULTILINE)
    except OSError:
        return None
    return None if found is None else found[1]


def driver_finding(cuda: str, driver: str | None) -> Finding:
    """What the driver's version means for a torch that was built for ``cuda``; too old a driver hides all
    devices from it."""
    major = int(cuda.partition(".")[0])
    oldest = _DRIVERS.get(major, max(_DRIVERS.values()))
    needs = f"CUDA {cuda}, for which this torch is built, needs {oldest} or newer"
    if driver is None:
        return Finding("NVIDIA driver", "missing", f"none is loaded; {needs}")
    if int(driver.partition(".")[0]) >= oldest:
        return Finding("NVIDIA driver", "ok", f"{driver}: {needs}")
    older = [number for number, least in _DRIVERS.items() if least <= int(driver.partition(".")[0])]
    other = f", or a torch built for CUDA {max(older)}" if older else ""
    return Finding("NVIDIA driver", "limited", f"{driver}: {needs}; install a newer driver{other}")


def _gpus() -> Iterator[Finding]:
    if torch.version.cuda is not None:
        yield driver_finding(torch.version.cuda, driver_version())
    if not torch.cuda.is_available():
        reason = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else "torch sees no device (driver, CUDA_VISIBLE_DEVICES?)"
        )
        yield Finding("CUDA", "missing", f"{reason}; runs use the CPU")
        return
    yield Finding("CUDA", "ok", f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        fp8 = capability >= _FP8_CAPABILITY
        yield Finding(
            f"GPU {index}",
            "ok" if fp8 else "limited",
            f"{properties.name}, {format_bytes(properties.total_memory)}, compute capability "
            f"{capability[0]}.{capability[1]}: " + ("FP8" if fp8 else "no FP8 (needs 8.9); BF16 only"),
        )
    nccl = torch.cuda.nccl.version()
    sums = nccl >= _FP8_REDUCING_NCCL
    yield Finding(
        "NCCL",
        "ok",
        ".".join(map(str, nccl)) + (": sums FP8" if sums else ": moves FP8 but cannot sum it (2.24.3 can)"),
    )


def _matmul() -> Iterator[Finding]:
    public = hasattr(F, "scaled_mm")
    yield Finding(
        "scaled_mm",
        "ok" if public else "limited",
        "torch.nn.functional.scaled_mm" if public else "older torch._scaled_mm is used",
    )
    devices = ["cpu"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FP8_CAPABILITY:
        devices.append("cuda")
    for device in devices:
        try:
            error = fp8_matmul_error(torch.device(device))
        except (RuntimeError, AttributeError, NotImplementedError) as problem:
            yield Finding(f"FP8 matmul {device}", "broken", str(problem).splitlines()[0])
            continue
        # Exact products of E4M3 values; only the FP32 sums round.
        good = error <= 1e-5
        yield Finding(
            f"FP8 matmul {device}",
            "ok" if good else "broken",
            f"E4M3 64x64x64, relative error {error:.1e} against float64",
        )


def fp8_matmul_error(device: torch.device) -> float:
    """Largest error of a small scaled E4M3 product with FP32 output, relative to the largest element."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    left, right = a.to(device), b.to(device).t()
    if hasattr(F, "scaled_mm"):
        tensorwise = F.ScalingType.TensorWise
        product = F.scaled_mm(left, right, one, tensorwise, one, tensorwise, output_dtype=torch.float32)
    else:
        product = torch._scaled_mm(left, right, one, one, out_dtype=torch.float32)
    exact = a.double() @ b.double().t()
    return float((product.cpu().double() - exact).abs().max() / exact.abs().max())


def _attention() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    call = AttentionCall(torch.bfloat16, num_heads=32, num_kv_heads=8, head_dim=128)
    backend = choose_attention_backend(device, call)
    slow = device.type == "cuda" and backend.kernels[0] == SDPBackend.EFFICIENT_ATTENTION
    yield Finding("attention", "limited" if slow else "ok", f"{backend} (BF16, 32 heads of 128 in 8 groups)")


def _fused_kernels() -> Iterator[Finding]:
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.ispkg:  # declarations; what a GPU launches is imported when it is needed
            importlib.import_module(f"{kernels.__name__}.{module.name}")
    yield fused_kernels_finding(len(OPERATIONS), cuda=torch.cuda.is_available(), triton=has_triton())


def fused_kernels_finding(operations: int, *, cuda: bool, triton: bool) -> Finding:
    """What runs where a GPU would fuse: ``operations`` declared ones."""
    what = f"{operations} operations"
    if not cuda:
        return Finding("fused kernels", "ok", f"{what}: on a CPU, torch operations in their place")
    if triton:
        return Finding("fused kernels", "ok", f"{what}: by Triton, compiled when they are first used")
    return Finding(
        "fused kernels", "limited", f"{what}: Triton is not installed; slower chains of torch operations"
    )


def _collectives() -> Iterator[Finding]:
    if not dist.is_available():
        yield Finding("gloo", "missing", "this torch is built without torch.distributed: one process only")
        return
    try:
        dist.init_process_group(
            "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20)
        )
        try:
            x = torch.arange(4.0)
            dist.all_reduce(x)
        finally:
            dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        yield Finding("gloo", "limited", f"{str(error).splitlines()[0]}; one process only")
        return
    yield Finding("gloo", "ok", "all-reduce of one process")


def _optional_libraries() -> Iterator[Finding]:
    for module, package, use in (
        ("triton", "triton", "fused kernels, torch.compile on CUDA"),
        ("tensorboard", "tensorboard", "logging.tensorboard"),
        ("wandb", "wandb", "logging.wandb"),
        ("transformers", "transformers", "extra hf: comparison with its models"),
    ):
        if importlib.util.find_spec(module) is None:
            yield Finding(module, "missing", f"not installed; needed only for {use}")
        else:
            yield Finding(module, "ok", f"{_version(package)} ({use})")
    for extension in EXTENSIONS:
        yield extension_finding(extension, visible_gpus())


def extension_finding(extension: Extension, gpus: list[Gpu] | None, has: Find = has_module) -> Finding:
    """What an optional package would do here: the settings that ask for it, or why they would be refused."""
    found = find(extension, has=has)
    if found.lacking is not None:
        return Finding(extension.name, "missing", f"{found.lacking}; {extension.install}")
    able: list[str] = []
    unable: list[str] = []
    for offer in extension.offers:
        setting = f"{offer.key}={'|'.join(offer.values)} ({offer.does})"
        lacking = find(extension, *offer.modules, has=has).lacking
        if lacking is None and offer.capability is not None:
            least = min((gpu.capability for gpu in gpus or ()), default=None)
            if least is None:
                lacking = "needs a CUDA device"
            elif least < offer.capability:
                lacking = f"needs compute capability {offer.capability[0]}.{offer.capability[1]}"
        (able if lacking is None else unable).append(setting if lacking is None else f"{setting}: {lacking}")
    told = "; ".join(([f"for {', '.join(able)}"] if able else []) + [f"not for {one}" for one in unable])
    return Finding(extension.name, "ok" if able else "limited", f"{found.version or 'found'}: {told}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _space() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", "ok", format_bytes(total))
    usage = shutil.disk_usage(Path.cwd())
    low = usage.free < 5 * 2**30
    yield Finding(
        "disk here",
        "limited" if low else "ok",
        f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
        + (": checkpoints fill it" if low else ""),
    )
