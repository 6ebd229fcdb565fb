"""The architecture ``LlamaForCausalLM``, and Mistral's, which is the same decoder where its attention window
is off."""

from __future__ import annotations

from functools import partial
from typing import Any

from fp8train.config.model_schema import ModelConfig
from fp8train.huggingface.architecture import Architecture, TensorMap, embeddings, vectors
from fp8train.huggingface.arrangements import GateUp, SeparateQKV
from fp8train.huggingface.config_json import ConfigJson
from fp8train.huggingface.rope import rope_config, rope_settings


def _settings(config: ConfigJson) -> dict[str, Any]:
    hidden_size = config.number("hidden_size")
    num_heads = config.number("num_attention_heads")
    config.choice("hidden_act", {"silu": None, "swish": None}, default="silu")
    config.optional("attention_dropout")
    mistral = config.values.get("model_type") == "mistral"
    window = config.optional("sliding_window")
    if mistral and (window is not None or "sliding_window" not in config.values):  # absent: 4096
        config.refuse("sliding_window", window or 4096, "this decoder's attention has no window")
    bias = config.flag("attention_bias", default=False)
    if config.flag("mlp_bias", default=False) != bias:
        config.refuse(
            "mlp_bias",
            not bias,
            f"this decoder has biases everywhere or nowhere; attention_bias is {str(bias).lower()}",
        )
    return {
        "family": "llama",
        "num_layers": config.number("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": config.number("num_key_value_heads", default=8 if mistral else num_heads),
        "head_dim": config.number("head_dim", default=hidden_size // num_heads),
        "ffn_hidden_size": config.number("intermediate_size"),
        "vocab_size": config.number("vocab_size"),
        "max_seq_len": config.number("max_position_embeddings"),
        "norm_eps": config.number("rms_norm_eps", float, default=1e-6),
        "bias": bias,
        "tie_embeddings": config.flag("tie_word_embeddings", default=False),
        "init_std": config.number("initializer_range", float, default=0.02),
        **rope_settings(config, theta_key="rope_theta", share_key="partial_rotary_factor", share=1.0),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        **rope_config(model, theta_key="rope_theta"),
    }


def _tensors(model: ModelConfig) -> list[TensorMap]:
    embedding, *head = embeddings(model, "model.embed_tokens.weight", LLAMA.head)
    maps = [
        embedding,
        TensorMap("final_norm.weight", ("model.norm.weight",)),
        *head,
    ]
    linear = partial(vectors, bias=model.bias)
    qkv = SeparateQKV(model.num_kv_heads, model.head_dim)
    gate_up = GateUp(model.ffn_hidden_size)
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        maps += [
            TensorMap(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)),
            *linear(f"{ours}.attention.qkv", *(f"{attention}.{x}_proj" for x in "qkv"), arrangement=qkv),
            *linear(f"{ours}.attention.out", f"{attention}.o_proj"),
            TensorMap(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)),
            *linear(f"{ours}.mlp.up", f"{mlp}.gate_proj", f"{mlp}.up_proj", arrangement=gate_up),
            *linear(f"{ours}.mlp.down", f"{mlp}.down_proj"),
        ]
    return maps


LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_types=("llama", "mistral"),
    base_prefix="model.",
    buffers=("rotary_emb.inv_freq",),
    aliases={},
    linears=True,
    head="lm_head.weight",
    settings=_settings,
    config=_config,
    tensors=_tensors,
)
