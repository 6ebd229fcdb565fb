"""The doctor: what it says about this machine, and that it notices what is broken."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from fp8train.cli import doctor as module
from fp8train.cli.doctor import (
    Finding,
    cpu_flags,
    doctor,
    driver_finding,
    driver_version,
    examine,
    fp8_matmul_error,
    fused_kernels_finding,
    table,
)
from fp8train.extensions.catalogue import APEX
from fp8train.extensions.gpus import Gpu
from fp8train.kernels.attention import AttentionBackend
from fp8train.kernels.fused_op import OPERATIONS


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("Able to train on ")
    columns = {line.split("  ")[0]: line for line in lines[:-2]}
    assert torch.__version__ in columns["PyTorch"]
    assert " ok " in columns["FP8 matmul cpu"]
    assert " ok " in columns["gloo"]
    # aligned: every status starts in the same column
    width = max(len(finding.item) for finding in examine())
    assert {line[width + 2 :].split()[0] for line in lines[:-2]} <= {"ok", "limited", "missing"}


def test_items_are_unique_and_explained() -> None:
    findings = examine()
    items = [finding.item for finding in findings]
    assert len(set(items)) == len(items)
    assert all(finding.explanation for finding in findings)


def test_the_error_of_a_wrong_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8_matmul_error(torch.device("cpu")) <= 1e-6
    right = torch.nn.functional.scaled_mm
    monkeypatch.setattr(
        "torch.nn.functional.scaled_mm", lambda *args, **kwargs: right(*args, **kwargs) * (1 + 2**-8)
    )
    assert fp8_matmul_error(torch.device("cpu")) == pytest.approx(2**-8, rel=1e-3)


def test_something_broken_makes_the_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "fp8_matmul_error", lambda device: 0.5)
    assert doctor() == 1
    assert "Not able to train: FP8 matmul cpu" in capsys.readouterr().out


def test_a_refused_product_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> float:
        raise NotImplementedError("no kernel\nlong C++ trace")

    monkeypatch.setattr(module, "fp8_matmul_error", refuse)
    finding = next(f for f in examine() if f.item == "FP8 matmul cpu")
    assert finding == Finding("FP8 matmul cpu", "broken", "no kernel")


def test_optional_packages_are_listed_with_what_they_would_do_here() -> None:
    def found_with(*modules: str, gpus: list[Gpu] | None = None) -> Finding:
        return module.extension_finding(APEX, gpus, has=lambda name: name in modules)

    assert "is not installed" in found_with().explanation
    assert "is not installed" in found_with("apex").explanation  # PyPI's package of that name
    no_gpu = found_with("apex", "amp_C", "fused_layer_norm_cuda")
    assert (
        no_gpu.status == "limited" and "kernels.norm=apex (norms): needs a CUDA device" in no_gpu.explanation
    )
    hopper = [Gpu("NVIDIA H100", (9, 0))]
    partly = found_with("apex", "amp_C", gpus=hopper)
    assert partly.status == "ok"
    assert "for kernels.optimizer=apex (AdamW of FP32 states)" in partly.explanation
    assert (
        "not for kernels.norm=apex (norms): is not complete: its fused_layer_norm_cuda" in partly.explanation
    )


def test_cpu_flags(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n\nprocessor\t: 1\nflags\t\t: other\n"
    )
    assert cpu_flags(file) == {"fpu", "avx512_bf16", "amx_bf16"}
    assert cpu_flags(tmp_path / "absent") == set()


def test_the_version_of_the_driver(tmp_path: Path) -> None:
    file = tmp_path / "version"
    for kind in ("NVIDIA UNIX x86_64 Kernel Module", "NVIDIA UNIX Open Kernel Module for x86_64"):
        file.write_text(
            f"NVRM version: {kind}  580.65.06  Release Build  (dvs-builder@1)\n"
            "GCC version:  gcc version 12.3.0 (Ubuntu)\n"
        )
        assert driver_version(file) == "580.65.06"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03")
    assert driver_version(file) == "535.129.03"
    file.write_text("something else")
    assert driver_version(file) is None
    assert driver_version(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("cuda", "driver", "status", "said"),
    [
        ("13.0", "580.65.06", "ok", "needs 580 or newer"),
        (
            "13.0",
            "575.57.08",
            "limited",
            "580 or newer; install a newer driver, or a torch built for CUDA 12",
        ),
        ("12.9", "575.57.08", "ok", "needs 525 or newer"),
        ("12.9", "470.1", "limited", "or a torch built for CUDA 11"),
        ("12.9", "418.4", "limited", "525 or newer; install a newer driver"),
        ("14.1", "575.57.08", "limited", "needs 580 or newer"),
        ("13.0", None, "missing", "none is loaded; CUDA 13.0, for which this torch is built, needs 580"),
    ],
)
def test_a_driver_too_old_for_cuda_is_told(cuda: str, driver: str | None, status: str, said: str) -> None:
    finding = driver_finding(cuda, driver)
    assert finding.status == status and said in finding.explanation


def test_the_driver_is_told_where_torch_sees_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "driver_version", lambda: "550.54.14")
    findings = {finding.item: finding for finding in module._gpus()}
    assert findings["NVIDIA driver"].status == "limited"
    assert "torch sees no device" in findings["CUDA"].explanation


def test_fused_kernels_are_told_as_they_are() -> None:
    found = next(finding for finding in examine() if finding.item == "fused kernels")
    assert int(found.explanation.split()[0]) == len(OPERATIONS) > 10
    assert "fp8train::optimizer_update" in OPERATIONS  # nothing else here has imported it
    on_cpu = fused_kernels_finding(7, cuda=False, triton=True)
    assert on_cpu.explanation == "7 operations: on a CPU, torch operations in their place"
    assert "by Triton" in fused_kernels_finding(7, cuda=True, triton=True).explanation
    without = fused_kernels_finding(7, cuda=True, triton=False)
    assert without.status == "limited" and "Triton is not installed" in without.explanation


@pytest.mark.parametrize(
    ("backend", "status"),
    [
        (AttentionBackend("cudnn", "r", (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)), "ok"),
        (AttentionBackend("efficient or math", "r", (SDPBackend.EFFICIENT_ATTENTION,)), "limited"),
    ],
)
def test_attention_of_a_gpu_without_fast_kernels_is_limited(
    monkeypatch: pytest.MonkeyPatch, backend: AttentionBackend, status: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "choose_attention_backend", lambda device, call: backend)
    (found,) = module._attention()
    assert (found.status, found.explanation) == (status, f"{backend} (BF16, 32 heads of 128 in 8 groups)")


def test_the_table_is_aligned() -> None:
    text = table([Finding("a", "ok", "x"), Finding("longer", "missing", "y")])
    assert text == "a       ok       x\nlonger  missing  y"


@pytest.mark.gpu
def test_a_gpu_is_described() -> None:
    findings = {finding.item: finding for finding in examine()}
    assert torch.cuda.get_device_name(0) in findings["GPU 0"].explanation
    if torch.cuda.get_device_capability(0) >= (8, 9):
        assert findings["FP8 matmul cuda"].status == "ok"
