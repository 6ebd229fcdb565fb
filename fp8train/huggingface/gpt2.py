"""The architecture ``GPT2LMHeadModel``: learned positions, fused c_attn, Conv1D ([in, out]) instead of
linears."""

from __future__ import annotations

from typing import Any

from fp8train.config.model_schema import ModelConfig
from fp8train.huggingface.architecture import Architecture, TensorMap, embeddings, vectors
from fp8train.huggingface.arrangements import Conv1D, SeparateQKV
from fp8train.huggingface.config_json import ConfigJson

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""transformers' names of GELU and of its tanh approximation."""


def _settings(config: ConfigJson) -> dict[str, Any]:
    hidden_size, num_heads = config.number("n_embd"), config.number("n_head")
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn"):
        config.optional(key)
    for key in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        config.optional(f"summary_{key}")
    config.only("scale_attn_weights", True, default=True, why="this decoder divides by the root of head_dim")
    config.only(
        "scale_attn_by_inverse_layer_idx", False, default=False, why="this decoder scales all layers alike"
    )
    config.only("add_cross_attention", False, default=False, why="this decoder attends to itself only")
    return {
        "family": "gpt",
        "num_layers": config.number("n_layer"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "ffn_hidden_size": config.number("n_inner", default=4 * hidden_size),
        "vocab_size": config.number("vocab_size"),
        "max_seq_len": config.number("n_positions"),
        "norm_eps": config.number("layer_norm_epsilon", float, default=1e-5),
        "activation": config.choice("activation_function", ACTIVATIONS, default="gelu_new"),
        "tie_embeddings": config.flag("tie_word_embeddings", default=True),
        "init_std": config.number("initializer_range", float, default=0.02),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.max_seq_len,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_hidden_size,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _tensors(model: ModelConfig) -> list[TensorMap]:
    embedding, *head = embeddings(model, "transformer.wte.weight", GPT2.head)
    maps = [
        embedding,
        TensorMap("positions.weight", ("transformer.wpe.weight",)),
        *vectors("final_norm", "transformer.ln_f"),
        *head,
    ]
    qkv = Conv1D(SeparateQKV(model.num_kv_heads, model.head_dim))
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        maps += [
            *vectors(f"{ours}.attention_norm", f"{theirs}.ln_1"),
            *vectors(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", arrangement=qkv),
            *vectors(f"{ours}.attention.out", f"{theirs}.attn.c_proj", arrangement=Conv1D()),
            *vectors(f"{ours}.mlp_norm", f"{theirs}.ln_2"),
            *vectors(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", arrangement=Conv1D()),
            *vectors(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", arrangement=Conv1D()),
        ]
    return maps


GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_types=("gpt2",),
    base_prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
    aliases={},
    linears=False,
    head="lm_head.weight",
    settings=_settings,
    config=_config,
    tensors=_tensors,
)
