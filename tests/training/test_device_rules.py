"""What a device cannot do is told before the run directory is touched."""

from pathlib import Path

import pytest
import torch

from fp8train.cli import run_command
from fp8train.config.errors import ConfigError
from fp8train.training.device_rules import check_device
from tests.training.launching import write_config
from tests.training.tiny import tiny_config

FP8 = ["precision.level=O1"]
EXACT = [*FP8, "precision.gradient.fp8.reduce=exact"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "device", "told"),
    [
        ([*EXACT, "run.deterministic=true"], "cpu", "equal threads per rank; set run.threads"),
        ([*EXACT, "run.threads=1"], "cuda", "set run.deterministic=true"),
        (
            [*FP8, "precision.gradient.fp8.reduce=shared_scale", "precision.gradient.fp8.sum=native"],
            "cpu",
            "CUDA",
        ),
        (
            ["run.cuda_graphs=true"],
            "cpu",
            "cuda_graphs: true is for CUDA devices, and this is a CPU; set",
        ),
        (["kernels.attention=flash2"], "cpu", "`attention`: flash2 is for CUDA devices"),
        ([*FP8, "kernels.gemm=te"], "cpu", "`gemm`: te needs an NVIDIA GPU, and this is a CPU"),
        ([*FP8, "kernels.gemm=te", "precision.recipe=mxfp8"], "cuda", "`gemm`: te has no kernel for output"),
    ],
)
def test_what_the_device_cannot_do(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], device: str, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=told):
        check_device(tiny_config(overrides), torch.device(device))


def test_what_it_can_do() -> None:
    check_device(tiny_config([*EXACT, "run.threads=1"]), CPU)
    check_device(tiny_config(["precision.recipe=nvfp4_simulated", *FP8]), CPU)
    check_device(tiny_config(), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is another")
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    words = ["train", str(write_config(tmp_path)), f"run.dir={tmp_path}", "run.name=none", *EXACT]
    assert run_command([*words, "run.threads=null", "run.deterministic=true"]) == 2
    assert not (tmp_path / "none").exists()
