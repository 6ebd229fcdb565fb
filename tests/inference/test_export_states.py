"""Decoded states in safetensors: the optimizer's own numbers, under the parameters' names."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.safetensors_files import parse_size, write_safetensors
from fp8train.cli import run_command
from fp8train.inference.export_states import export_states
from tests.inference.test_numerics import trained

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install 'fp8train[hf]'")
pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = {
    "O0": ("precision.level=O0",),
    "O2": ("precision.level=O2",),
    "paper": ("precision.level=O2", "precision.profile=paper", "optimizer.name=lion", "optimizer.lr=0.003"),
    "coat": ("precision.level=O1", "precision.state.plan=coat"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_numbers_are_the_optimizers(tmp_path: Path, plan: str) -> None:
    trainer, run = trained(tmp_path / "run", *PLANS[plan], steps=2)
    output = tmp_path / "states.safetensors"
    said = export_states(tmp_path / "run", output, max_shard_bytes=10**9)
    tensors = safetensors.load_file(output)
    optimizer, names = trainer.optimizer, dict(trainer.model.named_parameters())
    roles = optimizer.states.roles
    assert tensors.keys() == {fqn if role == "master" else f"{role}/{fqn}" for fqn in names for role in roles}
    for fqn in names:
        for role in roles:
            found = tensors[fqn if role == "master" else f"{role}/{fqn}"]
            assert found.dtype == torch.float32
            assert torch.equal(found, optimizer.states.decoded(fqn, role)), (fqn, role)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert said.startswith(f"{output}: {len(tensors)} tensors, {total:,} bytes in FP32, of {run.path}")
    if plan == "O2":  # decoded by hand: E4M3 codes times E8M0 scales, one per row of 32 elements
        stored = trainer.state_tensors()
        fqn = "blocks.0.attention.qkv.weight"
        fqn = fqn if fqn in names else next(name for name in names if f"exp_avg/{name}.scale" in stored)
        payload, scale = stored[f"exp_avg/{fqn}.payload"], stored[f"exp_avg/{fqn}.scale"]
        blocks = payload.double().view(*scale.shape, -1) * torch.exp2(scale.double() - 127).unsqueeze(-1)
        assert torch.equal(tensors[f"exp_avg/{fqn}"].double(), blocks.view(payload.shape))


def test_many_files_with_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run", "precision.level=O2", steps=1)
    words = ["export", "states", str(tmp_path / "run"), "--states", "fp32"]
    assert run_command([*words, "--output", str(tmp_path / "one.safetensors")]) == 0
    whole = safetensors.load_file(tmp_path / "one.safetensors")
    limit = 20_000
    output = ["--output", str(tmp_path / "many.safetensors"), "--max-shard-size", "20KB"]
    assert run_command([*words, *output]) == 0
    index = json.loads((tmp_path / "many.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("many-*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"many-00001-of-{len(files):05d}.safetensors"
    assert f"{len(files)} files beside" in capsys.readouterr().out
    seen = {}
    for file in files:
        part = safetensors.load_file(file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
        assert all(index["weight_map"][name] == file.name for name in part)
        seen |= part
    assert seen.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(seen[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    before = (tmp_path / "one.safetensors").read_bytes()
    assert run_command([*words, "--output", str(tmp_path / "one.safetensors")]) == 2
    assert "exists; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "one.safetensors").read_bytes() == before
    assert run_command([*words, "--output", str(tmp_path / "x.pt")]) == 2
    assert run_command([*words, "--output", str(tmp_path / "no" / "x.safetensors")]) == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_that_others_would_have(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path, "x", [({"a": 4}, lambda: {"a": torch.ones(1)})], max_bytes=100)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("3kb", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 parsecs", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(CheckpointError, match="--max-shard-size"):
        parse_size(text)
