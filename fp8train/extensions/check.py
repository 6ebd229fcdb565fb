"""Whether the packages that a configuration asks for are here, and able on this machine's GPUs."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.extensions.catalogue import EXTENSIONS, Capability, Extension, Find, Offer, find, has_module
from fp8train.extensions.gpus import Gpu, visible_gpus
from fp8train.precision.transformer_engine import NativeRecipe, gemms, native_recipe

_FP8: Capability = (8, 9)


def asked_for(config: Config) -> Iterator[tuple[Extension, Offer, str]]:
    """The extensions that a run uses, for what, and the value that asks for it."""
    for extension in EXTENSIONS:
        for offer in extension.offers:
            value: object = config
            for name in offer.key.split("."):
                value = getattr(value, name)
            if value in offer.values:
                yield extension, offer, str(value)


def check_extensions(config: Config, *, has: Find = has_module, gpus: list[Gpu] | str | None = "ask") -> None:
    """Refuse a run whose packages or GPUs are not what it asks for; nothing was imported or written.

    Args:
        config: of the run.
        has: whether a module can be imported.
        gpus: that are visible; None: none can be asked for; ``"ask"``: ask.

    Raises:
        ConfigError: a package is absent, incomplete or of an unsupported version, or a GPU is too old; one
            line for each.
    """
    visible = visible_gpus() if isinstance(gpus, str) else gpus
    on_cuda = _runs_on_cuda(config, visible)
    problems = []
    for extension, offer, value in asked_for(config):
        setting = f"{offer.key}: {value}"
        found = find(extension, *offer.modules, has=has)
        default = "native" if offer.key == "engine" else "auto"
        if found.lacking is not None:
            problems.append(
                f"{setting}: {extension.name} {found.lacking}; {extension.install}; or write "
                f"{offer.key}={default}"
            )
        elif offer.capability is not None and not on_cuda:
            problems.append(
                f"{setting}: {extension.name} needs a CUDA device, and this run has none; write "
                f"{offer.key}={default}"
            )
        elif offer.capability is not None and (old := _below(offer.capability, visible)) is not None:
            problems.append(f"{setting} needs {_text(offer.capability)}, {old}; write {offer.key}={default}")
        elif offer.key == "kernels.gemm" and (unfit := _unfit(config, visible)) is not None:
            problems.append(f"{setting}: {unfit}; write {offer.key}={default}")
    if on_cuda and config.precision.gemm.fp8 and (old := _below(_FP8, visible)) is not None:
        problems.append(
            f"precision.gemm.fp8: FP8 GEMMs need {_text(_FP8)}, {old}; write precision.gemm.fp8=false or "
            "run.device=cpu"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _unfit(config: Config, visible: list[Gpu] | None) -> str | None:
    """Why Transformer Engine does not multiply on the first GPU that is another than the recipe asks for."""
    quant = config.precision.gemm.value()
    assert quant is not None, "the configuration refuses kernels.gemm without FP8"
    native = native_recipe(quant) if config.kernels.gemm == "te_native" else None
    for gpu in visible or ():
        if isinstance(native, NativeRecipe):
            if (problem := native.unfit(gpu.capability)) is not None:
                return problem
        elif not any(gemms(quant, gpu.capability).values()):
            return f"has no kernel for precision.recipe: {config.precision.recipe} on {gpu}"
    return None


def _text(capability: Capability) -> str:
    return f"compute capability {capability[0]}.{capability[1]} or newer"


def _below(least: Capability, visible: list[Gpu] | None) -> str | None:
    """The first GPU that is older, in words; None without one."""
    return next((f"and there is {gpu}" for gpu in visible or () if gpu.capability < least), None)


def _runs_on_cuda(config: Config, visible: list[Gpu] | None) -> bool:
    if config.run.device != "auto":
        return config.run.device == "cuda"
    return bool(visible) and not _is_torch_for_cpus()


def _is_torch_for_cpus() -> bool:
    try:
        return re.search(r"\+cpu", importlib.metadata.version("torch")) is not None
    except importlib.metadata.PackageNotFoundError:
        return False
