"""Our tensors under the names and layouts of transformers' Llama, GPT-2 and GPT-NeoX.

The map is a permutation, so it serves weights and gradients alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp8train.config.model_schema import ModelConfig
from fp8train.layers.mlp import shard_unit


def split_qkv(fused: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) rows of a fused projection (or its bias), ordered by group: query heads, key, value."""
    per_group = model.num_heads // model.num_kv_heads
    groups = fused.unflatten(0, (model.num_kv_heads, per_group + 2, model.head_dim))
    query, key, value = groups[:, :per_group], groups[:, per_group], groups[:, per_group + 1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def split_gate_up(fused: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """(gate, up) rows of SwiGLU's fused projection, which alternate in units."""
    units = fused.unflatten(0, (-1, 2, shard_unit(model.ffn_hidden_size)))
    return units[:, 0].flatten(0, 1), units[:, 1].flatten(0, 1)


def to_llama(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Names and layouts of ``transformers.LlamaForCausalLM``, padding of the vocabulary cut off."""
    found = {
        "model.embed_tokens.weight": tensors["embedding.weight"][: model.vocab_size],
        "model.norm.weight": tensors["final_norm.weight"],
    }
    if not model.tie_embeddings:
        found["lm_head.weight"] = tensors["head.weight"][: model.vocab_size]
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        q, k, v = split_qkv(tensors[ours + "attention.qkv.weight"], model)
        gate, up = split_gate_up(tensors[ours + "mlp.up.weight"], model)
        found |= {
            theirs + "input_layernorm.weight": tensors[ours + "attention_norm.weight"],
            theirs + "post_attention_layernorm.weight": tensors[ours + "mlp_norm.weight"],
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": tensors[ours + "attention.out.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": tensors[ours + "mlp.down.weight"],
        }
    return found


def to_gpt2(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Names and layouts of ``transformers.GPT2LMHeadModel``: Conv1D keeps [in, out]; q, k, v in turn."""
    found = {
        "transformer.wte.weight": tensors["embedding.weight"][: model.vocab_size],
        "transformer.wpe.weight": tensors["positions.weight"],
        "transformer.ln_f.weight": tensors["final_norm.weight"],
        "transformer.ln_f.bias": tensors["final_norm.bias"],
    }
    names = {
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for i in range(model.num_layers):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                tensor = tensors[f"layers.{i}.{ours}.{kind}"]
                if ours == "attention.qkv":
                    tensor = torch.cat(split_qkv(tensor, model))
                found[f"transformer.h.{i}.{theirs}.{kind}"] = tensor.t() if tensor.dim() == 2 else tensor
    return found


def to_neox(tensors: Mapping[str, Tensor], model: ModelConfig, *, head: str) -> dict[str, Tensor]:
    """Names of ``transformers.GPTNeoXForCausalLM``, whose fused projection has our row order (q, k, v of each
    head). ``head``: its name of the head, which changed."""
    found = {
        "gpt_neox.embed_in.weight": tensors["embedding.weight"][: model.vocab_size],
        "gpt_neox.final_layer_norm.weight": tensors["final_norm.weight"],
        "gpt_neox.final_layer_norm.bias": tensors["final_norm.bias"],
        head: tensors["head.weight"][: model.vocab_size],
    }
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    for i in range(model.num_layers):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                found[f"gpt_neox.layers.{i}.{theirs}.{kind}"] = tensors[f"layers.{i}.{ours}.{kind}"]
    return found
