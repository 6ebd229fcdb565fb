"""The independent model is Llama: ours and transformers' have the same loss and gradients in FP64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fp8train.config.model_schema import ModelConfig
from tests.models.hf_mapping import to_llama
from tests.models.settings import VOCAB_SIZE, gradients, random_tokens, tiny_config, tiny_model
from tests.truth.model import Truth, decoder_truth, llama_truth

TOLERANCE = 1e-9
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2},
    "one group, tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "several units": {"ffn_hidden_size": 384, "rope_theta": 50.0},
}


def truth_of(name: str):
    config = tiny_config({"family": "llama", "init_std": 0.2, **MODELS[name]}, precision={"compute": "fp64"})
    ours = tiny_model(config)
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24, seed=4)
    truth = llama_truth(ours.state_dict(), tokens, targets, ours.config, factors={})
    return config, ours, tokens, targets, truth


def assert_same(truth: Truth, found: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(truth.gradients)
    for fqn, expected in truth.gradients.items():
        assert expected.abs().max() > 1e-4, fqn
        assert (found[fqn] - expected).abs().max() <= TOLERANCE * expected.abs().max(), fqn


@pytest.mark.parametrize("name", MODELS)
def test_our_decoder_in_fp64(name: str) -> None:
    config, ours, tokens, targets, truth = truth_of(name)
    assert_same(truth, gradients(ours, tokens, targets))
    # The decoder as truth (of static parametrisations), with nothing of ours around it.
    again = decoder_truth(ours.state_dict(), tokens, targets, config, vocab_size=VOCAB_SIZE, factors={})
    assert again.loss == pytest.approx(truth.loss, rel=TOLERANCE)
    assert_same(truth, again.gradients)


def test_factors_on_modules_and_targets_left_out() -> None:
    config, ours, tokens, targets, plain = truth_of("grouped")
    targets = targets.clone()
    targets[0, ::3] = -100
    factors = {"layers.1.mlp": 30.0, "layers.0.attention": 1e-3, "layers.0.mlp_norm": 2.0, "final_norm": 0.5}
    weights = ours.state_dict()
    truth = llama_truth(weights, tokens, targets, ours.config, factors=factors)
    again = decoder_truth(weights, tokens, targets, config, vocab_size=VOCAB_SIZE, factors=factors)
    assert abs(truth.loss - plain.loss) > 0.01
    assert_same(truth, again.gradients)


class Rotary(nn.Module):
    """transformers' rotary table in FP64; theirs is computed in FP32 whatever the model is."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        doubled = torch.cat((angles, angles), dim=-1)
        return doubled.cos(), doubled.sin()


def in_fp64(theirs: nn.Module, model: ModelConfig) -> nn.Module:
    """transformers' Llama without the three places where it computes in FP32: norms and softmax are then
    torch's own, the rotary table is :class:`Rotary`."""
    theirs.double()
    theirs.set_attn_implementation("sdpa")
    theirs.model.rotary_emb = Rotary(model.head_dim, model.rope_theta)
    norms = [path for path, _ in theirs.named_modules() if path.endswith("norm")]
    for path in norms:
        parent, _, name = path.rpartition(".")
        norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps, dtype=torch.float64)
        setattr(theirs.get_submodule(parent), name, norm)
    assert len(norms) == 2 * model.num_layers + 1
    return theirs


@pytest.mark.parametrize("name", MODELS)
def test_transformers_llama_in_fp64(name: str) -> None:
    pytest.importorskip("transformers", reason="compares with transformers: pip install 'fp8train[hf]'")
    from tests.models.test_hf_parity import llama_of

    _, ours, tokens, targets, truth = truth_of(name)
    model = ours.config
    theirs = in_fp64(llama_of(model), model)
    _, unexpected = theirs.load_state_dict(to_llama(ours.state_dict(), model), strict=False)
    assert unexpected == []
    logits = theirs(input_ids=tokens, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(truth.loss, rel=TOLERANCE)
    found = {fqn: p.grad for fqn, p in theirs.named_parameters()}
    assert_same(Truth(truth.loss, to_llama(truth.gradients, model)), found)
