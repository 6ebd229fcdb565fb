"""What is known about parameters, and their values at step 0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fp8train.models import param_spec
from fp8train.models.build import build_model, initialise
from fp8train.models.param_spec import ParamSpec, initial_value, initial_values
from fp8train.models.shapes import padded_vocab_size
from tests.models.settings import FAMILIES, VOCAB_SIZE, tiny_config, tiny_model

CPU = torch.device("cpu")


def spec(fqn: str, shape: tuple[int, ...], std: float = 0.02) -> ParamSpec:
    return ParamSpec(
        fqn=fqn,
        role="hidden",
        global_shape=shape,
        fan_in=shape[1],
        fan_out=shape[0],
        init="normal",
        init_std=std,
        lr_mult=1.0,
        decay="lr_times_lambda",
    )


def test_initial_value_depends_on_seed_name_and_shape_only() -> None:
    one = initial_value(spec("a", (40, 30)), 7)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(one, initial_value(spec("a", (40, 30)), 7))
    for other in (
        initial_value(spec("b", (40, 30)), 7),
        initial_value(spec("a", (40, 30)), 8),
    ):
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 0.1


def test_initial_value_is_the_same_in_every_release() -> None:
    """A changed rule would change every run that restarts from its seed."""
    first = initial_value(spec("layers.0.mlp.up.weight", (4, 4), std=1.0), 1234)[0]
    assert first.tolist() == pytest.approx([-0.1567507, -0.3448698, -1.4717336, -0.6915364], abs=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ahead", [0, 9000, 2**30])
def test_values_drawn_by_threads_are_those_drawn_alone(
    monkeypatch: pytest.MonkeyPatch, threads: int, ahead: int
) -> None:
    """In order, with the same bits; no more of them exist at once than threads and bytes allow."""
    specs = [spec(f"layers.{i}", (10 + i, 64)) for i in range(12)]
    limit = max(1, min(threads, ahead // (4 * 64 * 10)))
    drawn: list[str] = []

    def draw(one: ParamSpec, seed: int) -> torch.Tensor:
        drawn.append(one.fqn)
        return initial_value(one, seed)

    monkeypatch.setattr(param_spec, "initial_value", draw)
    monkeypatch.setattr(param_spec, "_DRAWN_AHEAD", ahead)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for i, value in enumerate(initial_values(specs, 7)):
        assert len(drawn) <= i + 1 + limit
        assert torch.equal(value, initial_value(specs[i], 7))
    assert sorted(drawn) == sorted(one.fqn for one in specs)


def test_masters_are_seeded_in_the_order_of_parameters() -> None:
    model = tiny_model(tiny_config(FAMILIES["llama"]), perturb=False)
    seeded: dict[str, torch.Tensor] = {}
    initialise(model, 3, lambda fqn, value: seeded.update({fqn: value}))
    assert list(seeded) == [fqn for fqn, _ in model.named_parameters()]
    for fqn, value in seeded.items():
        assert torch.equal(value, initial_value(model.specs[fqn], 3))


def test_a_draw_that_fails_is_raised_where_its_value_is_wanted() -> None:
    broken = spec("b", (2**62, 2**62))
    with pytest.raises(RuntimeError):
        list(initial_values([spec("a", (4, 4)), broken], 1))


def test_no_layer_depends_on_how_many_there_are() -> None:
    """Layers that both models have start equal, but for the depth in the scale of residual projections."""
    small = tiny_model(tiny_config({**FAMILIES["llama"], "num_layers": 1}), perturb=False).state_dict()
    large = tiny_model(tiny_config({**FAMILIES["llama"], "num_layers": 4}), perturb=False).state_dict()
    for name, value in small.items():
        factor = 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
        torch.testing.assert_close(large[name], value * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_deviations(family: str) -> None:
    std, layers = 0.03, 8
    model = tiny_model(
        tiny_config({**FAMILIES[family], "num_layers": layers, "init_std": std}), perturb=False
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == expected).all(), name
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        expected = std / math.sqrt(2 * layers) if residual else std
        error = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a standard deviation
        assert parameter.std().item() == pytest.approx(expected, rel=error), name
        assert abs(parameter.mean().item()) < 4 * expected / math.sqrt(parameter.numel()), name


def test_specs_of_a_gpt() -> None:
    config = tiny_config({**FAMILIES["gpt"], "tie_embeddings": False}, precision={"gemm": {"fp8": True}})
    model = build_model(config, vocab_size=VOCAB_SIZE, device=CPU).model
    roles = {
        "embedding.weight": "embedding",
        "positions.weight": "position",
        "layers.0.attention_norm.weight": "norm",
        "layers.0.attention_norm.bias": "bias",
        "layers.0.attention.qkv.weight": "hidden",
        "layers.0.attention.qkv.bias": "bias",
        "layers.0.attention.out.weight": "residual_out",
        "layers.0.attention.out.bias": "bias",
        "layers.0.mlp_norm.weight": "norm",
        "layers.0.mlp_norm.bias": "bias",
        "layers.0.mlp.up.weight": "hidden",
        "layers.0.mlp.up.bias": "bias",
        "layers.0.mlp.down.weight": "residual_out",
        "layers.0.mlp.down.bias": "bias",
        "final_norm.weight": "norm",
        "final_norm.bias": "bias",
        "head.weight": "head",
    }
    assert {n: s.role for n, s in model.specs.items() if not n.startswith("layers.1")} == roles
    in_plan = {name for name, s in model.specs.items() if s.in_fp8_plan}
    assert in_plan == {name for name, s in model.specs.items() if s.role in ("hidden", "residual_out")}
    for name, parameter in model.named_parameters():
        s = model.specs[name]
        matrix = parameter.dim() == 2
        assert (s.fqn, s.global_shape) == (name, tuple(parameter.shape))
        assert (s.fan_out, s.fan_in) == (tuple(parameter.shape) if matrix else (0, 0))
        assert s.decay == ("lr_times_lambda" if matrix else None)
        assert s.lr_mult == 1.0
    assert model.specs["layers.1.mlp.down.weight"].init_std == pytest.approx(0.02 / 2)


def count(model: dict[str, Any]) -> int:
    """Parameters in closed form, from the settings alone."""
    c = tiny_config(model).model
    h, f, layers = c.hidden_size, c.ffn_hidden_size, c.num_layers
    vocab = padded_vocab_size(c.vocab_size or VOCAB_SIZE, c.vocab_multiple)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = h * (q + 2 * kv) + q * h + (3 if c.activation == "swiglu" else 2) * h * f
    norms = h * (2 if c.norm == "layernorm" and c.bias else 1)
    biases = (q + 2 * kv + h + f * (2 if c.activation == "swiglu" else 1) + h) if c.bias else 0
    tables = vocab * h * (1 if c.tie_embeddings else 2) + (
        c.max_seq_len * h if c.positions == "learned" else 0
    )
    return tables + layers * (matrices + biases + 2 * norms) + norms


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "GPT-2 small": (
        {
            "family": "gpt",
            "num_layers": 12,
            "hidden_size": 768,
            "num_heads": 12,
            "ffn_hidden_size": 3072,
            "max_seq_len": 1024,
            "vocab_size": 50257,
            "vocab_multiple": 1,
        },
        124_439_808,
    ),
    "Llama-2 7B": (
        {
            "family": "llama",
            "num_layers": 32,
            "hidden_size": 4096,
            "num_heads": 32,
            "ffn_hidden_size": 11008,
            "max_seq_len": 4096,
            "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    "Llama-3 8B": (
        {
            "family": "llama",
            "num_layers": 32,
            "hidden_size": 4096,
            "num_heads": 32,
            "num_kv_heads": 8,
            "ffn_hidden_size": 14336,
            "max_seq_len": 8192,
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_models(name: str) -> None:
    settings, published = PUBLISHED[name]
    meta = build_model(tiny_config(settings), vocab_size=1, device=torch.device("meta")).model
    assert sum(p.numel() for p in meta.parameters()) == published == count(settings)


@pytest.mark.parametrize(
    "model",
    [
        FAMILIES["gpt"],
        FAMILIES["llama"],
        {"family": "gpt", "activation": "swiglu", "num_kv_heads": 2, "positions": "rope"},
        {"family": "llama", "bias": True, "norm": "layernorm", "tie_embeddings": True, "head_dim": 10},
    ],
)
def test_parameter_counts(model: dict[str, Any]) -> None:
    built = build_model(tiny_config(model), vocab_size=VOCAB_SIZE, device=CPU).model
    assert sum(p.numel() for p in built.parameters()) == count(model)


@pytest.mark.parametrize(
    ("compute", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)]
)
def test_masters_start_from_the_unrounded_values(compute: str, dtype: torch.dtype) -> None:
    config = tiny_config(FAMILIES["llama"], precision={"compute": compute})
    model = build_model(config, vocab_size=VOCAB_SIZE, device=CPU).model
    masters: dict[str, torch.Tensor] = {}
    initialise(model, 5, masters.__setitem__)
    assert list(masters) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert masters[name].dtype == torch.float32
        assert parameter.dtype == dtype
        assert torch.equal(parameter, masters[name].to(dtype))
    if compute == "bf16":
        assert not torch.equal(masters["head.weight"], masters["head.weight"].bfloat16().float())
