"""Factors of unit scaling and u-μP, operation by operation, against the authors' library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import unit_scaling.functional as U
from torch import Tensor
from torch.nn import functional as F
from unit_scaling.core.functional import transformer_residual_scaling_rule
from unit_scaling.optim import lr_scale_func_adam
from unit_scaling.parameter import Parameter

from fp8train.config.parametrization_schema import ParametrizationConfig
from fp8train.kernels.attention import scaled_dot_product_attention
from fp8train.layers.factors import scale, scale_backward, scale_forward
from fp8train.layers.linear import Linear
from fp8train.layers.loss import linear_cross_entropy
from fp8train.layers.mlp import MLP
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.layers.residual import ResidualRule
from fp8train.models.parametrization import Batch, Parametrization, equal_shares_ratio
from fp8train.models.unit_scaling import UnitMaximalUpdate, attention_variance, gated_factor, gelu_factors
from tests.models.settings import tiny_config

TOKENS, WIDTH, FFN, VOCAB = 24, 32, 48, 61


def umup(model: dict[str, Any] | None = None, **settings: Any) -> UnitMaximalUpdate:
    """u-μP of a tiny model whose step has TOKENS tokens."""
    config = tiny_config({"family": "llama", "vocab_size": VOCAB, **(model or {})})
    section = ParametrizationConfig(kind="umup", residual="umup", **settings)
    return UnitMaximalUpdate(config.model, section, Batch(TOKENS, TOKENS))


def same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, rtol: float = 1e-10
) -> None:
    """Outputs and all gradients, for the same output gradient."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        torch.manual_seed(5)
        y.backward(torch.randn_like(y))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_with_a_bias_of_zero() -> None:
    """The library multiplies the bias by α as well; here it is added afterwards. Gradients are the same."""
    alphas = umup().linear(WIDTH, FFN)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer = Linear(WIDTH, FFN, bias=True, dtype=torch.float64, alphas=alphas)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    same(ours, U.linear, normal(TOKENS, WIDTH), normal(FFN, WIDTH, seed=2), 0 * normal(FFN))


@pytest.mark.parametrize("mult", [1.0, 0.5])
def test_head_and_loss(mult: float) -> None:
    rule = umup(loss_mult=mult)
    targets = torch.arange(TOKENS) % VOCAB

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, vocab_size=VOCAB, alphas=rule.head())

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        return U.cross_entropy(U.linear_readout(x, weight, None), targets, reduction="sum", mult=mult)

    same(ours, theirs, normal(TOKENS, WIDTH), normal(VOCAB, WIDTH, seed=2))
    assert rule.gradient_scale == TOKENS, "of the mean loss: gradients are those of the sum"


def test_embedding() -> None:
    rule, index = umup(), torch.arange(TOKENS) % 7

    def ours(weight: Tensor) -> Tensor:
        return scale_backward(F.embedding(index, weight), rule.lookup_grad(VOCAB))

    same(ours, lambda weight: U.embedding(index, weight), normal(VOCAB, WIDTH))


def test_sum_of_embeddings() -> None:
    rule = umup()
    same(lambda a, b: scale(a + b, rule.embedding_sum()), U.add, normal(TOKENS, WIDTH), normal(TOKENS, WIDTH))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_with_gain(kind: str) -> None:
    make: Any = RMSNorm if kind == "rms" else LayerNorm
    more = {} if kind == "rms" else {"bias": False}
    norm = make(WIDTH, eps=1e-5, dtype=torch.float64, gain_grad=umup().vector_grad(), **more)
    library = U.rms_norm if kind == "rms" else U.layer_norm

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    same(
        ours,
        lambda x, weight: library(x, (WIDTH,), weight),
        normal(TOKENS, WIDTH),
        normal(WIDTH, seed=2),
        rtol=1e-5 if kind == "rms" else 1e-10,  # the library takes the root in FP32
    )


@pytest.mark.parametrize("mult", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_non_linearity(activation: Any, mult: float) -> None:
    rule = umup({"activation": activation}, activation_mult=mult)
    mlp = MLP(
        hidden_size=WIDTH,
        ffn_hidden_size=FFN,
        activation=activation,
        bias=False,
        dtype=torch.float64,
        activation_mult=mult,
        factors=rule.activation(),
    )

    def theirs(up: Tensor) -> Tensor:
        if activation == "swiglu":
            units = up.unflatten(-1, (-1, 2, mlp.unit))
            return U.silu_glu(units[..., 1, :].flatten(-2), units[..., 0, :].flatten(-2), mult=mult)
        return U.gelu(up, mult=mult, approximate="tanh" if activation == "gelu_tanh" else "none")

    same(mlp._activate, theirs, normal(TOKENS, 2 * FFN if activation == "swiglu" else FFN))


@pytest.mark.parametrize("mult", [1.0, 4.0])
def test_attention(mult: float) -> None:
    rule = umup(attention_mult=mult).attention()

    def ours(*heads: Tensor) -> Tensor:
        mixed = scaled_dot_product_attention(
            *(scale_backward(x, rule.factors.grad) for x in heads),
            attn_mask=None,
            is_causal=True,
            enable_gqa=False,
            scale=rule.logits_scale,
        )
        return scale_forward(mixed, rule.factors.output)

    def theirs(*heads: Tensor) -> Tensor:
        return U.scaled_dot_product_attention(*heads, is_causal=True, mult=mult)

    same(ours, theirs, *(normal(2, 4, TOKENS, WIDTH // 4, seed=i) for i in range(3)))


@pytest.mark.parametrize("branch", [0, 1, 6])
def test_residual_branches(branch: int) -> None:
    rule = umup({"num_layers": 5}, residual_mult=0.7, residual_attention_ratio=1.3)
    tau = transformer_residual_scaling_rule(0.7, 1.3)(branch, 10)

    def theirs(x: Tensor) -> Tensor:
        entering, skip = U.residual_split(x, tau)
        return U.residual_add(entering.sin(), skip, tau)

    def ours(x: Tensor) -> Tensor:
        joint = rule.residual(branch)
        return joint.join(x, joint.enter(x).sin())

    same(ours, theirs, normal(TOKENS, WIDTH))


@pytest.mark.parametrize(("mult", "ratio"), [(1.0, 1.0), (0.5, 2.0)])
def test_branches_have_the_shares_of_the_final_stream_that_they_were_promised(
    mult: float, ratio: float
) -> None:
    branches = 12
    shares = [1.0]  # of the stream's variance: embedding first
    for branch in range(branches):
        weight = equal_shares_ratio(branch, num_branches=branches, residual_mult=mult, attention_ratio=ratio)
        shares = [share / (1 + weight**2) for share in shares] + [weight**2 / (1 + weight**2)]
    embedding, attention, mlp = shares[0], sum(shares[1::2]), sum(shares[2::2])
    assert embedding + attention + mlp == pytest.approx(1.0, abs=1e-12)
    assert (attention / mlp) ** 0.5 == pytest.approx(ratio, rel=1e-9)
    assert ((attention + mlp) / 2 / embedding) ** 0.5 == pytest.approx(mult, rel=1e-9)
    assert len(set(map(lambda share: round(share, 12), shares[1::2]))) == 1, "all attention branches alike"


@pytest.mark.parametrize("rule", ["fixed", "running_mean", "umup"])
def test_joins_keep_unit_variance(rule: Any) -> None:
    config = tiny_config({"family": "llama", "num_layers": 12, "vocab_size": VOCAB})
    one = Parametrization(config.model, ParametrizationConfig(residual=rule), Batch(TOKENS, TOKENS))
    for branch in range(24):
        join = one.residual(branch)
        assert join.a**2 + join.b**2 == pytest.approx(1.0, abs=1e-12)
    if rule == "running_mean":  # the l-th branch weighs as much as each thing before it
        assert one.residual(23).b == pytest.approx(25**-0.5)


def test_delayed_branch_gradient_reaches_the_stream_as_the_true_one() -> None:
    """A branch is linear in its gradient: b at its start or at its end is the same for the stream."""
    x, weight = normal(TOKENS, WIDTH), normal(WIDTH, WIDTH, seed=2)
    true, late = ResidualRule(0.8, 0.6), ResidualRule(0.8, 0.6, delayed=True)
    same(
        lambda x: late.join(x, (late.enter(x) @ weight).sin()),
        lambda x: true.join(x, (true.enter(x) @ weight).sin()),
        x,
    )


def test_learning_rates_are_the_library_s() -> None:
    rule, depth = umup({"num_layers": 3}), 6
    for fqn, role, mup_type, shape in (
        ("embedding.weight", "embedding", "weight", (VOCAB, WIDTH)),
        ("layers.0.attention.qkv.weight", "hidden", "weight", (FFN, WIDTH)),
        ("layers.2.mlp.down.weight", "residual_out", "weight", (WIDTH, FFN)),
        ("layers.1.mlp_norm.weight", "norm", "norm", (WIDTH,)),
        ("layers.1.mlp.up.bias", "bias", "bias", (FFN,)),
        ("final_norm.weight", "norm", "norm", (WIDTH,)),
        ("head.weight", "head", "output", (VOCAB, WIDTH)),
    ):
        parameter = Parameter(
            torch.zeros(shape), mup_type, mup_scaling_depth=depth if fqn.startswith("layers.") else None
        )
        expected = lr_scale_func_adam(parameter)
        assert rule.lr_mult(fqn, role, shape) == pytest.approx(expected, rel=1e-12), fqn  # type: ignore[arg-type]


@pytest.mark.parametrize("mult", [0.5, 1.0, 2.0])
def test_factors_of_non_linearities_against_simulation(mult: float) -> None:
    """The fits are within 5 % of 1 over the true deviation."""
    x, y = normal(400_000).requires_grad_(), normal(400_000, seed=2)
    gelu = F.gelu(mult * x) / mult
    (slope,) = torch.autograd.grad(gelu.sum(), x)
    x, gelu = x.detach(), gelu.detach()
    factors = gelu_factors(mult)
    assert float(gelu.std()) * factors.output == pytest.approx(1.0, abs=0.05)
    assert float(slope.square().mean().sqrt()) * factors.grad == pytest.approx(1.0, abs=0.05)
    gated = y * F.silu(mult * x) / mult
    assert float(gated.square().mean().sqrt()) * gated_factor(mult) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("length", [16, 256])
def test_attention_variance_against_simulation(length: int) -> None:
    logits = normal(200, length, length)
    probability = torch.softmax(logits.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf), -1)
    simulated = float(probability.square().sum(-1).mean())
    assert attention_variance(length) == pytest.approx(simulated, rel=0.01)


def test_geometric_mean_of_a_linear_is_the_paper_s() -> None:
    """2303.11257: (mn)^(-1/4) for both, where the edge is constrained."""
    alphas = umup(constraint="geometric_mean").linear(64, 256)
    assert alphas.output == alphas.grad_input == pytest.approx((64 * 256) ** -0.25)
