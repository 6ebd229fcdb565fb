"""What is asked for and is not here is refused at once, in one message, and nothing is left behind."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fp8train.config.errors import ConfigError
from fp8train.extensions import catalogue
from fp8train.extensions.catalogue import (
    APEX,
    DEEPSPEED,
    EXTENSIONS,
    TRANSFORMER_ENGINE,
    Extension,
    find,
    has_module,
)
from fp8train.extensions.check import asked_for, check_extensions
from fp8train.extensions.gpus import Gpu, visible_gpus
from tests.training.launching import write_config
from tests.training.tiny import tiny_config

HOPPER, AMPERE = Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA A100", (8, 0))
TE_MODULES = {"transformer_engine", "transformer_engine_torch"}
APEX_MODULES = {"apex", "amp_C", "fused_layer_norm_cuda"}


def refusal(overrides: Sequence[str], modules: set[str], gpus: list[Gpu] | None = None) -> str:
    """What a run is told; empty if nothing."""
    try:
        check_extensions(tiny_config(list(overrides)), has=lambda name: name in modules, gpus=gpus)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of distributions, as the test likes them."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name in found:
            return found[name]
        raise catalogue.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(catalogue.importlib.metadata, "version", version)
    return found


def test_nothing_is_asked_for_by_default() -> None:
    assert list(asked_for(tiny_config())) == []
    assert refusal([], set()) == ""


def test_what_is_absent() -> None:
    told = refusal(["kernels.norm=apex", "kernels.attention=te"], set(), [HOPPER])
    first, second = told.splitlines()
    assert first.startswith("kernels.attention: te: Transformer Engine is not installed; pip install")
    assert second.startswith("kernels.norm: apex: NVIDIA apex is not installed; build NVIDIA's sources")
    assert second.endswith("or write kernels.norm=auto")
    assert refusal(["engine=deepspeed", "parallel.zero=1"], set()).endswith("or write engine=native")


def test_the_other_apex_is_not_nvidias() -> None:
    """PyPI's package of that name is a web toolkit."""
    assert "is not installed; build NVIDIA's sources" in refusal(["kernels.optimizer=apex"], {"apex"})
    assert refusal(["kernels.optimizer=apex", "run.device=cuda"], {"amp_C"}, [HOPPER]) == ""
    told = refusal(["kernels.norm=apex"], {"amp_C"}, [HOPPER])
    assert "is not complete: its fused_layer_norm_cuda is not installed" in told


def test_sources_without_their_library_are_no_transformer_engine() -> None:
    told = refusal(["kernels.norm=te"], {"transformer_engine"}, [HOPPER])
    assert "is not complete: its transformer_engine_torch is not installed" in told


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("2.14", True),
        ("2.13.0", False),
        ("2.20.2+cu13", True),
        ("1.13.0", False),
        ("2.8", False),
        ("3.0", False),
    ],
)
def test_versions(versions: dict[str, str], version: str, good: bool) -> None:
    versions["transformer_engine"] = version
    found = find(TRANSFORMER_ENGINE, has=lambda name: name in TE_MODULES)
    assert found.version == version
    assert (found.lacking is None) == good
    if not good:
        assert found.lacking == f"{version} is not supported; supported are 2.14 and newer, below 3"


def test_what_has_no_gpu() -> None:
    told = refusal(["kernels.norm=apex"], APEX_MODULES, None)
    assert told.startswith("kernels.norm: apex: NVIDIA apex needs a CUDA device, and this run has none")
    assert refusal(["run.device=cpu"], set(), [AMPERE]) == ""


def test_fp8_before_ada() -> None:
    fp8 = ["precision.level=O2", "run.device=cuda"]
    told = refusal(fp8, set(), [HOPPER, AMPERE])
    assert told == (
        "precision.gemm.fp8: FP8 GEMMs need compute capability 8.9 or newer, and there is NVIDIA A100 "
        "(compute capability 8.0); write precision.gemm.fp8=false or run.device=cpu"
    )
    assert refusal(fp8, set(), [HOPPER]) == ""
    assert refusal(["precision.level=O2", "run.device=cpu"], set(), [AMPERE]) == ""


def test_every_offer_is_of_a_setting_that_there_is() -> None:
    from fp8train.config.keys import key_table

    for extension in EXTENSIONS:
        for offer in extension.offers:
            legal = key_table().keys[offer.key].fragment["enum"]
            assert set(offer.values) <= set(legal), offer


def test_every_setting_that_asks_for_a_package_has_an_offer() -> None:
    from fp8train.config.keys import key_table

    offered = {(offer.key, value) for one in EXTENSIONS for offer in one.offers for value in offer.values}
    for key in key_table().children(("kernels",)):
        for value in key.fragment["enum"]:
            ours = value in ("auto", "flash3", "cudnn", "flash2", "math")
            assert ours != ((key.name, value) in offered), (key.name, value)


class FakeNvml:
    """NVIDIA's library with these GPUs."""

    def __init__(self, *gpus: Gpu, broken: bool = False) -> None:
        self.gpus, self.broken, self.open = gpus, broken, 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 9 if self.broken else 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, name: Any, size: ctypes.c_uint) -> int:
        assert size.value == len(name)
        name.value = self.gpus[handle.value - 1].name.encode()
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self.gpus[handle.value - 1].capability
        return 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [HOPPER, AMPERE]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [AMPERE]),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, [AMPERE, HOPPER]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, [HOPPER, AMPERE]),
    ],
)
def test_gpus_by_nvidias_library(environment: dict[str, str], expected: list[Gpu]) -> None:
    library = FakeNvml(HOPPER, AMPERE)
    assert visible_gpus(environment, lambda name: library) == expected
    assert library.open == 0


def test_no_library_and_one_that_does_not_answer() -> None:
    def absent(name: str) -> Any:
        raise OSError(name)

    assert visible_gpus({}, absent) is None
    assert visible_gpus({}, lambda name: FakeNvml(broken=True)) is None


def _unless_installed(override: str, extension: Extension) -> Any:
    installed = all(has_module(name) for name in extension.modules)
    return pytest.param(
        override, marks=pytest.mark.skipif(installed, reason=f"{extension.name} is installed")
    )


@pytest.mark.parametrize(
    "override",
    [
        _unless_installed("engine=deepspeed", DEEPSPEED),
        _unless_installed("kernels.norm=apex", APEX),
        _unless_installed("kernels.gemm=te", TRANSFORMER_ENGINE),
    ],
)
def test_a_command_says_so_within_two_seconds_and_leaves_nothing(tmp_path: Path, override: str) -> None:
    """Measured in its own process, as a user waits for it; by processor time, for tests share machines."""
    more = {"kernels.gemm=te": ["precision.level=O1"], "engine=deepspeed": ["parallel.zero=1"]}.get(
        override, []
    )
    told = refused_command(tmp_path, [*more, override])
    assert "is not installed" in told


def refused_command(tmp_path: Path, overrides: Sequence[str], **environment: str) -> str:
    """What a run is told that is refused: within two seconds, with one message, leaving nothing."""
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "fp8train", "train", str(config), f"run.dir={tmp_path}/runs"]
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(
        [*command, *overrides],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert used < 2, f"{used:.1f} s of processor time, {time.perf_counter() - began:.1f} s in all"
    assert not (tmp_path / "runs").exists()
    return done.stderr


def pretended(tmp_path: Path, module: str, distribution: str, version: str, *more: str) -> str:
    """A folder with a package that must not be imported."""
    site = tmp_path / "site"
    for name in (module, *more):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise SystemExit('imported')")
    described = site / f"{distribution}-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])


NVML = r"""
static const char *gpu = "%s";
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)1L; return 0; }
int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    unsigned i = 0;
    for (; gpu[i] && i + 1 < size; i++) name[i] = gpu[i];
    name[i] = 0;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = %d;
    *minor = %d;
    return 0;
}
"""


def with_gpu(tmp_path: Path, gpu: Gpu) -> dict[str, str]:
    """An environment whose library of NVIDIA's knows one GPU."""
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("needs gcc, which makes a library that tells of a GPU")
    source = tmp_path / "nvml.c"
    source.write_text(NVML % (gpu.name, *gpu.capability))
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_LIBRARY_PATH": str(tmp_path)}


def test_a_command_with_a_package_that_is_too_old(tmp_path: Path) -> None:
    path = pretended(tmp_path, "deepspeed", "deepspeed", "0.16.4")
    told = refused_command(tmp_path, ["engine=deepspeed", "parallel.zero=1"], PYTHONPATH=path)
    assert "DeepSpeed 0.16.4 is not supported; supported are 0.19 and newer, below 0.20" in told


def test_a_command_on_a_gpu_that_cannot(tmp_path: Path) -> None:
    """MXFP8 on Hopper."""
    path = pretended(
        tmp_path, "transformer_engine", "transformer_engine", "2.20.2", "transformer_engine_torch"
    )
    overrides = ["run.device=cuda", "precision.level=O1", "precision.recipe=mxfp8", "kernels.gemm=te"]
    told = refused_command(tmp_path, overrides, PYTHONPATH=path, **with_gpu(tmp_path, HOPPER))
    assert "has no kernel for precision.recipe: mxfp8 on NVIDIA H100 (compute capability 9.0)" in told


def test_a_command_for_fp8_before_ada(tmp_path: Path) -> None:
    told = refused_command(tmp_path, ["run.device=cuda", "precision.level=O2"], **with_gpu(tmp_path, AMPERE))
    assert "FP8 GEMMs need compute capability 8.9 or newer, and there is NVIDIA A100" in told


BLACKWELL, RTX = Gpu("NVIDIA B200", (10, 0)), Gpu("NVIDIA RTX 5090", (12, 0))
ADA = Gpu("NVIDIA L40S", (8, 9))


@pytest.mark.parametrize(
    ("gemm", "recipe", "gpu", "problem"),
    [
        ("te", "current", ADA, ""),
        ("te", "mxfp8", BLACKWELL, ""),
        ("te", "mxfp8", HOPPER, "has no kernel for precision.recipe: mxfp8 on NVIDIA H100"),
        ("te", "mxfp8", RTX, "has no kernel for precision.recipe: mxfp8 on NVIDIA RTX 5090"),
        ("te", "blockwise", HOPPER, ""),
        ("te", "blockwise", BLACKWELL, ""),
        ("te", "blockwise", ADA, "has no kernel for precision.recipe: blockwise"),
        ("te", "rowwise", HOPPER, "has no kernel for precision.recipe: rowwise"),
        (
            "te_native",
            "mxfp8",
            HOPPER,
            "MXFP8BlockScaling needs compute capability 10.0 or newer and below 12.0",
        ),
        ("te_native", "nvfp4_simulated", HOPPER, "NVFP4BlockScaling needs compute capability 10.0 or newer"),
        ("te_native", "nvfp4_simulated", BLACKWELL, ""),
        ("te_native", "blockwise", ADA, "Float8BlockScaling needs compute capability 9.0 or newer"),
    ],
    ids=str,
)
def test_products_by_recipe_and_gpu(gemm: str, recipe: str, gpu: Gpu, problem: str) -> None:
    overrides = ["precision.gemm.fp8=true", f"kernels.gemm={gemm}", f"precision.recipe={recipe}"]
    told = refusal([*overrides, "run.device=cuda", "data.seq_length=32"], TE_MODULES, [gpu])
    if problem:
        assert told.startswith(f"kernels.gemm: {gemm}: ") and told.endswith("write kernels.gemm=auto")
    assert problem in told
    assert bool(told) == bool(problem)
