"""The doctor: what it says about this machine, and that it notices what is broken."""

import importlib
from pathlib import Path

import pytest
import torch

from fp8train.cli import doctor as module
from fp8train.cli.doctor import (
    Finding,
    cpu_flags,
    doctor,
    driver_finding,
    driver_version,
    examine,
    fp8_matmul_error,
    table,
)


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


def test_the_other_apex_is_not_taken_for_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert module._apex().status == "missing"
    assert "not NVIDIA's extensions" in module._apex().explanation
    (tmp_path / "amp_C.py").touch()
    importlib.invalidate_caches()
    assert module._apex().status == "ok"


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


def test_the_table_is_aligned() -> None:
    text = table([Finding("a", "ok", "x"), Finding("longer", "missing", "y")])
    assert text == "a       ok       x\nlonger  missing  y"


@pytest.mark.gpu
def test_a_gpu_is_described() -> None:
    findings = {finding.item: finding for finding in examine()}
    assert torch.cuda.get_device_name(0) in findings["GPU 0"].explanation
    if torch.cuda.get_device_capability(0) >= (8, 9):
        assert findings["FP8 matmul cuda"].status == "ok"
