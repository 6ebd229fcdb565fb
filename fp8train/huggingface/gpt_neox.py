"""The architecture ``GPTNeoXForCausalLM``, where its branches follow one another and whole heads are rotated.
Its fused projection has our row order: query, key and value of each head."""

from __future__ import annotations

from typing import Any

from fp8train.config.model_schema import ModelConfig
from fp8train.huggingface.architecture import Architecture, TensorMap, embeddings, vectors
from fp8train.huggingface.config_json import ConfigJson
from fp8train.huggingface.gpt2 import ACTIVATIONS
from fp8train.huggingface.rope import rope_config, rope_settings


def _settings(config: ConfigJson) -> dict[str, Any]:
    hidden_size = config.number("hidden_size")
    for key in ("attention_dropout", "hidden_dropout", "classifier_dropout", "is_decoder"):
        config.optional(key)
    config.only(
        "use_parallel_residual",
        False,
        default=True,
        why="this decoder's attention and MLP follow each other",
    )
    config.only("attention_bias", True, default=True, why="this decoder has biases everywhere or nowhere")
    return {
        "family": "gpt",
        "num_layers": config.number("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": config.number("num_attention_heads"),
        "ffn_hidden_size": config.number("intermediate_size", default=4 * hidden_size),
        "vocab_size": config.number("vocab_size"),
        "max_seq_len": config.number("max_position_embeddings"),
        "norm_eps": config.number("layer_norm_eps", float, default=1e-5),
        "activation": config.choice("hidden_act", ACTIVATIONS, default="gelu"),
        "tie_embeddings": config.flag("tie_word_embeddings", default=False),
        "init_std": config.number("initializer_range", float, default=0.02),
        **rope_settings(config, theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[model.activation],
        "max_position_embeddings": model.max_seq_len,
        "initializer_range": model.init_std,
        "layer_norm_eps": model.norm_eps,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "tie_word_embeddings": model.tie_embeddings,
        **rope_config(model, theta_key="rotary_emb_base"),
    }


def _tensors(model: ModelConfig) -> list[TensorMap]:
    embedding, *head = embeddings(model, "gpt_neox.embed_in.weight", GPT_NEOX.head)
    maps = [
        embedding,
        *vectors("final_norm", "gpt_neox.final_layer_norm"),
        *head,
    ]
    names = {
        "attention_norm": "input_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    for i in range(model.num_layers):
        for ours, theirs in names.items():
            maps += vectors(f"layers.{i}.{ours}", f"gpt_neox.layers.{i}.{theirs}")
    return maps


GPT_NEOX = Architecture(
    name="GPTNeoXForCausalLM",
    model_types=("gpt_neox",),
    base_prefix="gpt_neox.",
    buffers=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    aliases={"embed_out.weight": "lm_head.weight"},
    linears=False,
    head="embed_out.weight",
    settings=_settings,
    config=_config,
    tensors=_tensors,
)
