"""Which linears run in FP8, and the line that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8train.config.errors import ConfigError
from fp8train.models.build import BuiltModel, build_model
from tests.models.settings import FAMILIES, VOCAB_SIZE, tiny_config

LINEARS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")


def build(gemm: dict[str, Any], **model: Any) -> BuiltModel:
    config = tiny_config({**FAMILIES["llama"], "num_layers": 4, **model}, precision={"gemm": gemm})
    return build_model(config, vocab_size=VOCAB_SIZE, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("gemm", "line"),
    [
        ({}, "FP8: 16 of 17 linears; skipped 1 (head: 1)"),
        ({"first_layers_bf16": 1}, "FP8: 12 of 17 linears; skipped 5 (first/last layers: 4, head: 1)"),
        (
            {"first_layers_bf16": 1, "last_layers_bf16": 2},
            "FP8: 4 of 17 linears; skipped 13 (first/last layers: 12, head: 1)",
        ),
        (
            {"exclude": ["layers.0.*", "*.mlp.down"]},
            "FP8: 9 of 17 linears; skipped 8 (exclude: 7, head: 1)",
        ),
        (
            {"exclude": ["*.attention.out.weight"], "last_layers_bf16": 1},
            "FP8: 9 of 17 linears; skipped 8 (exclude: 3, first/last layers: 4, head: 1)",
        ),
        ({"min_dim": 32}, "FP8: 16 of 17 linears; skipped 1 (head: 1)"),
    ],
)
def test_report(gemm: dict[str, Any], line: str) -> None:
    built = build({"fp8": True, **gemm})
    assert built.fp8 is not None
    assert str(built.fp8) == line
    converted = {name for name, linear in built.model.linears().items() if linear.plan is not None}
    assert set(built.fp8.converted) == converted
    in_plan = {name.removesuffix(".weight") for name, spec in built.model.specs.items() if spec.in_fp8_plan}
    assert in_plan == converted


def test_min_dim_is_compared_with_the_smaller_side() -> None:
    built = build({"fp8": True, "min_dim": 40}, hidden_size=64, head_dim=8, num_kv_heads=4)
    assert built.fp8 is not None
    assert str(built.fp8) == "FP8: 12 of 17 linears; skipped 5 (dimension < 40: 4, head: 1)"
    assert set(built.fp8.skipped["dimension < 40"]) == {f"layers.{i}.attention.out" for i in range(4)}


def test_first_and_last_layers_by_name() -> None:
    built = build({"fp8": True, "first_layers_bf16": 1, "last_layers_bf16": 1})
    assert built.fp8 is not None
    assert built.fp8.converted == tuple(f"layers.{i}.{name}" for i in (1, 2) for name in LINEARS)


def test_without_fp8_nothing_is_converted() -> None:
    built = build({"fp8": False})
    assert built.fp8 is None
    assert built.backend is None
    assert all(linear.plan is None for linear in built.model.linears().values())


def test_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"precision.gemm.exclude: 'layers.4.\*' matches no linear; paths look like layers.0.attention",
    ):
        build({"fp8": True, "exclude": ["*.mlp.up", "layers.4.*"]})


@pytest.mark.parametrize(
    "gemm", [{"first_layers_bf16": 4}, {"exclude": ["*"]}, {"last_layers_bf16": 9}, {"min_dim": 48}]
)
def test_nothing_left_is_an_error(gemm: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"every linear is excluded; relax exclude/min_dim/\*_layers_bf16"):
        build({"fp8": True, **gemm})


def test_operands_that_do_not_fit_are_an_error() -> None:
    """``keep_x: same`` reuses the forward's payload, so the two specs must be equal."""
    with pytest.raises(ConfigError, match=r"keep_x: same reuses the payload of output.x"):
        build({"fp8": True, "grad_weight": {"x": {"margin": 1}}})
