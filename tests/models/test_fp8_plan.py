"""Which linears run in FP8, the line that says so, and the connection that makes it true."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.layers.linear_plan import Alphas
from fp8train.models.build import BuiltModel, build_model, initialise
from fp8train.models.connect import connect_linears, make_fp8_parts
from tests.models.settings import FAMILIES, VOCAB_SIZE, random_tokens, tiny_config, tiny_model

LINEARS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")


def config_of(gemm: dict[str, Any], *, weights: str = "compute", **model: Any) -> Config:
    precision = {"gemm": gemm, "weights": weights}
    return tiny_config({**FAMILIES["llama"], "num_layers": 4, **model}, precision=precision)


def build(gemm: dict[str, Any], **settings: Any) -> BuiltModel:
    config = config_of(gemm, **settings)
    return build_model(config, vocab_size=VOCAB_SIZE, device=torch.device("cpu"))


def connected(gemm: dict[str, Any], **settings: Any) -> BuiltModel:
    built = build(gemm, **settings)
    connect_linears(built, make_fp8_parts(built))
    return built


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
    assert all(linear.plan is None for linear in built.model.linears().values())  # decided, not done
    assert built.fp8 is not None
    assert str(built.fp8) == line
    connect_linears(built, make_fp8_parts(built))
    converted = {name for name, linear in built.model.linears().items() if linear.plan is not None}
    assert set(built.fp8.converted) == converted
    in_plan = {name.removesuffix(".weight") for name, spec in built.model.specs.items() if spec.in_fp8_plan}
    assert in_plan == converted


def test_min_dim_is_compared_with_the_smaller_side() -> None:
    built = build({"fp8": True, "min_dim": 40}, hidden_size=64, head_dim=8, num_kv_heads=4)
    assert built.fp8 is not None
    assert str(built.fp8) == "FP8: 12 of 17 linears; skipped 5 (dimension < 40: 4, head: 1)"
    sides = {name: (m.in_features, m.out_features) for name, m in built.model.linears().items()}
    assert {name for name, pair in sides.items() if min(pair) >= 40} == set(built.fp8.converted)
    assert set(built.fp8.skipped["dimension < 40"]) == {f"layers.{i}.attention.out" for i in range(4)}


def test_first_and_last_layers_by_name() -> None:
    built = build({"fp8": True, "first_layers_bf16": 1, "last_layers_bf16": 1})
    assert built.fp8 is not None
    assert built.fp8.converted == tuple(f"layers.{i}.{name}" for i in (1, 2) for name in LINEARS)


def test_without_fp8_nothing_is_converted() -> None:
    built = connected({"fp8": False})
    assert built.fp8 is None
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


@pytest.mark.parametrize(
    ("weights", "gemm", "forward_only", "down", "others"),
    [
        ("compute", {}, False, "cached", "cached"),
        ("fp8", {}, False, "resident", "resident"),
        ("fp8", {}, True, "loaded", "loaded"),
        ("compute", {}, True, "loaded", "loaded"),
        ("compute", {"smooth_swiglu": "token"}, False, "cached", "cached"),
        ("compute", {"smooth_swiglu": "channel"}, False, "in_forward", "cached"),
        ("compute", {"smooth_swiglu": "channel"}, True, "in_forward", "loaded"),
    ],
)
def test_how_each_weight_is_held(
    weights: str, gemm: dict[str, Any], forward_only: bool, down: str, others: str
) -> None:
    precision = {"gemm": {"fp8": True, "exclude": ["layers.0.*"], **gemm}, "weights": weights}
    config = tiny_config(FAMILIES["llama"], precision=precision)
    built = build_model(config, vocab_size=VOCAB_SIZE, device=torch.device("cpu"), forward_only=forward_only)
    assert built.fp8 is not None
    assert {path: plan.holding for path, plan in built.fp8.plans.items()} == {
        f"layers.1.{name}": down if name == "mlp.down" else others for name in LINEARS
    }
    parts = make_fp8_parts(built)
    connect_linears(built, parts)
    in_fp8_alone = {name for name in LINEARS if (down if name == "mlp.down" else others)[:2] in ("re", "lo")}
    for path, linear in built.model.linears().items():
        alone = path.startswith("layers.1.") and path.removeprefix("layers.1.") in in_fp8_alone
        assert linear.fp8_weight_is_resident is alone
        assert linear.weight.untyped_storage().nbytes() == (4 if alone else linear.weight.numel() * 4)
    assert set(parts.resident) | set(parts.loaded) == {f"layers.1.{name}.weight" for name in in_fp8_alone}
    assert (not parts.resident) if forward_only else (not parts.loaded)


def test_a_model_is_connected_once_and_not_run_before() -> None:
    built = build({"fp8": True})
    with pytest.raises(AssertionError, match=r"layers\.0\.attention\.qkv is in .* plan but not connected"):
        built.model.logits(random_tokens(1, 4))
    connect_linears(built, make_fp8_parts(built))
    with pytest.raises(AssertionError, match=r"layers\.0\.attention\.qkv is connected already"):
        connect_linears(built, make_fp8_parts(built))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["standard", "mus", "umup"])
def test_linears_know_their_path_and_multipliers(family: str, kind: str) -> None:
    """As the parametrisation gives them for the role and the logical shape in the parameter's spec."""
    settings = {**FAMILIES[family], "hidden_size": 32, "ffn_hidden_size": 48, "tie_embeddings": False}
    if kind == "umup":
        settings |= {"norm_gain": False}
    model = tiny_model(tiny_config(settings, parametrization={"kind": kind}), perturb=False)
    rule = model.parametrization
    assert len(model.linears()) == 8
    for path, linear in model.linears().items():
        spec = model.specs[f"{path}.weight"]
        assert linear.name == path
        assert linear.alphas == rule.linear(spec.fan_in, spec.fan_out)
        if kind == "mus":
            assert linear.alphas.output == linear.in_features**-0.5
        assert (linear.alphas == Alphas()) is (kind == "standard")


@pytest.mark.parametrize("smooth", ["off", "channel"])
@pytest.mark.parametrize("tied", [False, True])
def test_partitioned_weights_are_cast_at_use(smooth: str, tied: bool) -> None:
    """Nothing is kept of them in FP8, no block reads weights of modules that do not run, and what reads
    another module's weight is told."""
    precision = {"gemm": {"fp8": True, "smooth_swiglu": smooth, "head": "fp8"}, "weights": "compute"}
    family = FAMILIES["llama"] | {"tie_embeddings": tied}
    config = tiny_config(family, precision=precision)
    losses = []
    for partitioned in (False, True):
        built = build_model(
            config, vocab_size=VOCAB_SIZE, device=torch.device("cpu"), partitioned=partitioned
        )
        assert built.fp8 is not None
        parts = make_fp8_parts(built)
        connect_linears(built, parts)
        initialise(built.model, 1)
        tokens = torch.arange(16).view(2, 8) % VOCAB_SIZE
        loss = built.model(tokens, tokens)
        loss.backward()
        losses.append((loss.detach(), *(p.grad for p in built.model.parameters())))
    assert {plan.holding for plan in built.fp8.plans.values()} == {"at_use"} and not parts.weights
    assert all(block.one_by_one for block in built.model.held_blocks())
    assert built.model.fp8_head is not None and built.model.fp8_head.nbytes == 0
    borrowed = [(built.model.head, built.model.embedding.weight)] if tied else []
    assert [(m, id(p)) for m, p in built.model.borrowed_weights()] == [(m, id(p)) for m, p in borrowed]
    for ours, theirs in zip(*losses, strict=True):
        assert torch.equal(ours, theirs)
