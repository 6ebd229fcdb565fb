"""The packages: how each is found, which versions are supported, and what it offers for which setting.

A package is found by the modules that do the work, never by its name alone: PyPI's ``apex`` is another
project, and Transformer Engine's Python sources can be installed without the library that they call.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

Capability = tuple[int, int]
"""Compute capability of a GPU, (major, minor)."""
Find = Callable[[str], bool]
"""Whether a module of this name could be imported."""


@dataclass(frozen=True)
class Offer:
    """What a package does for one value of one setting.

    Attributes:
        key: the setting.
        values: its values that ask for the package.
        does: in a few words.
        modules: of the package that it needs besides :attr:`Extension.modules`.
        capability: the least of the GPU; None: it runs on CPUs too.
    """

    key: str
    values: tuple[str, ...]
    does: str
    modules: tuple[str, ...] = ()
    capability: Capability | None = (8, 0)


@dataclass(frozen=True)
class Extension:
    """A package beside this one.

    Attributes:
        name: as people call it.
        modules: that must all be there; the first is what is imported.
        distribution: whose version counts; None where it has no distribution of its own.
        least: the oldest version supported.
        below: the first version that is not.
        install: what to do to have it.
        offers: what it is used for.
    """

    name: str
    modules: tuple[str, ...]
    distribution: str | None
    least: str
    below: str
    install: str
    offers: tuple[Offer, ...]


@dataclass(frozen=True)
class Found:
    """What is here of an extension.

    Attributes:
        version: as its distribution says; None where it says none.
        lacking: why it cannot be used; None if it can.
    """

    version: str | None
    lacking: str | None


TRANSFORMER_ENGINE = Extension(
    name="Transformer Engine",
    modules=("transformer_engine", "transformer_engine_torch"),
    distribution="transformer_engine",
    least="2.14",  # storages, quantisers and general_gemm as they are called; read from the sources of each
    below="3",
    install="pip install --no-build-isolation 'transformer-engine[pytorch]>=2.14,<3' beside a torch for CUDA",
    offers=(
        Offer("kernels.gemm", ("te", "te_native"), "FP8 products", capability=(8, 9)),
        Offer("kernels.quantize", ("te",), "FP8 casts", capability=(8, 9)),
        Offer("kernels.attention", ("te",), "attention"),
        Offer("kernels.norm", ("te",), "norms"),
    ),
)
APEX = Extension(
    name="NVIDIA apex",
    modules=("amp_C",),
    distribution=None,
    least="0",
    below="1",
    install="build NVIDIA's sources (github.com/NVIDIA/apex) with APEX_CPP_EXT=1 APEX_CUDA_EXT=1; PyPI's "
    "package apex is another project",
    offers=(
        Offer("kernels.norm", ("apex",), "norms", ("fused_layer_norm_cuda",)),
        Offer("kernels.optimizer", ("apex",), "AdamW of FP32 states"),
        Offer("kernels.multi_tensor", ("apex",), "norm of all gradients"),
    ),
)
DEEPSPEED = Extension(
    name="DeepSpeed",
    modules=("deepspeed",),
    distribution="deepspeed",
    least="0.19",
    below="0.20",
    install="launch/setup.sh deepspeed, or pip install wheel setuptools ninja and then "
    "pip install --no-build-isolation 'fp8train[deepspeed]'",
    offers=(Offer("engine", ("deepspeed",), "ZeRO-1 to 3, offload", capability=None),),
)
EXTENSIONS = (TRANSFORMER_ENGINE, APEX, DEEPSPEED)


def has_module(name: str) -> bool:
    """Whether a top-level module could be imported; imports nothing."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a module of that name is being replaced, or has no spec
        return False


def find(extension: Extension, *modules: str, has: Find = has_module) -> Found:
    """What is here of an extension, and of further ``modules`` of it."""
    version = _version(extension)
    wanted = (*extension.modules, *modules)
    missing = [name for name in wanted if not has(name)]
    if len(missing) == len(wanted):
        return Found(version, "is not installed")
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return Found(version, f"is not complete: its {' and '.join(missing)} {verb} not installed")
    if version is not None and not _numbers(extension.least) <= _numbers(version) < _numbers(extension.below):
        supported = f"{extension.least} and newer, below {extension.below}"
        return Found(version, f"{version} is not supported; supported are {supported}")
    return Found(version, None)


def _version(extension: Extension) -> str | None:
    if extension.distribution is None:
        return None
    try:
        return importlib.metadata.version(extension.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, ``2.9.0+cu13`` -> (2, 9, 0)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
