"""Logits and gradients equal those of transformers' Llama, GPT-2 and GPT-NeoX on the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8train.config.model_schema import ModelConfig
from fp8train.models.decoder import Decoder
from tests.models.hf_mapping import to_gpt2, to_llama, to_neox
from tests.models.settings import gradients, random_tokens, tiny_config, tiny_model

transformers = pytest.importorskip(
    "transformers", reason="compares with transformers: pip install 'fp8train[hf]'"
)

TOLERANCE = 1e-5  # FP32
BATCH = 2

Map = Callable[[Mapping[str, Tensor], ModelConfig], dict[str, Tensor]]

LLAMAS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mqa, tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "wide heads": {"num_kv_heads": 2, "head_dim": 16},
    "several shard units": {"ffn_hidden_size": 384},
    "llama-3 rope beyond the original context": {
        "num_kv_heads": 2,
        "rope_theta": 50.0,  # 4 frequencies that cover the kept, the ramped and the stretched range
        "max_seq_len": 48,
        "rope_scaling": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_seq_len": 28,
        },
    },
}


def llama_of(model: ModelConfig) -> nn.Module:
    """transformers' Llama with the same settings."""
    scaling = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    new_style = "rope_parameters" in transformers.LlamaConfig().to_dict()
    rope_arguments: dict[str, Any] = {"rope_parameters": rope}
    if not new_style:  # before transformers 5
        rope_arguments = {
            "rope_theta": model.rope_theta,
            "rope_scaling": None if scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        }
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
        pad_token_id=None,
        **rope_arguments,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2_of(model: ModelConfig) -> nn.Module:
    """transformers' GPT-2 with the same settings."""
    assert model.activation == "gelu_tanh"
    config = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_seq_len,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.ffn_hidden_size,
        activation_function="gelu_new",
        layer_norm_epsilon=model.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


def neox_of(model: ModelConfig) -> nn.Module:
    """transformers' GPT-NeoX with the same settings, branches one after the other."""
    rope = {"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": 1.0}
    new_style = "rope_parameters" in transformers.GPTNeoXConfig().to_dict()
    old_rope = {"rotary_pct": 1.0, "rotary_emb_base": model.rope_theta}
    config = transformers.GPTNeoXConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        max_position_embeddings=model.max_seq_len,
        hidden_act="gelu",
        layer_norm_eps=model.norm_eps,
        use_parallel_residual=False,
        tie_word_embeddings=False,
        attn_implementation="eager",
        **({"rope_parameters": rope} if new_style else old_rope),
    )
    return transformers.GPTNeoXForCausalLM(config)


def assert_same_function(ours: Decoder, theirs: nn.Module, to_theirs: Map) -> None:
    """Same weights in, same logits and gradients of the mean loss out."""
    model = ours.config
    missing, unexpected = theirs.load_state_dict(to_theirs(ours.state_dict(), model), strict=False)
    tied = {"lm_head.weight"} if model.tie_embeddings else set()
    assert (set(missing) - tied, unexpected) == (set(), [])

    tokens = random_tokens(BATCH, model.max_seq_len)
    targets = random_tokens(BATCH, model.max_seq_len, seed=4)
    their_logits = theirs(input_ids=tokens, use_cache=False).logits
    assert their_logits.std() > 0.1, "weights too small for the comparison to mean anything"
    torch.testing.assert_close(ours.logits(tokens), their_logits, rtol=0, atol=TOLERANCE)

    nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()
    our_grads = to_theirs(gradients(ours, tokens, targets), model)
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(our_grads) == set(their_grads)
    for name, expected in their_grads.items():
        assert expected is not None
        assert expected.abs().max() > 1e-4, name
        assert (our_grads[name] - expected).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(name: str) -> None:
    config = tiny_config({"family": "llama", "init_std": 0.2, **LLAMAS[name]})
    ours = tiny_model(config)
    assert_same_function(ours, llama_of(ours.config), to_llama)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied: bool) -> None:
    config = tiny_config(
        {"family": "gpt", "activation": "gelu_tanh", "init_std": 0.2, "tie_embeddings": tied}
    )
    ours = tiny_model(config)

    def to_theirs(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
        head = {} if tied else {"lm_head.weight": tensors["head.weight"][: model.vocab_size]}
        return to_gpt2(tensors, model) | head

    assert_same_function(ours, gpt2_of(ours.config), to_theirs)


def test_gpt_neox() -> None:
    """A GPT with rotary positions: LayerNorm, biases, exact GELU, untied."""
    config = tiny_config({"family": "gpt", "positions": "rope", "tie_embeddings": False, "init_std": 0.2})
    ours = tiny_model(config)
    theirs = neox_of(ours.config)
    head = next(
        name for name, _ in theirs.named_parameters() if name in ("lm_head.weight", "embed_out.weight")
    )
    assert_same_function(ours, theirs, lambda tensors, model: to_neox(tensors, model, head=head))


def test_padding_of_the_vocabulary_gets_no_gradient() -> None:
    ours = tiny_model(tiny_config({"family": "llama"}))
    grads = gradients(ours, random_tokens(2, 8), random_tokens(2, 8, seed=4))
    assert ours.config.vocab_size == 61
    assert grads["head.weight"].shape[0] == 64
    assert grads["head.weight"][61:].count_nonzero() == 0
