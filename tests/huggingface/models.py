"""Tiny random models of transformers, one for each way in which an importable one can differ; and runs of
ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8train.checkpoint.save import save_checkpoint
from fp8train.config.schema import Config, to_plain
from fp8train.models.decoder import Decoder
from tests.models.settings import tiny_model

transformers = pytest.importorskip(
    "transformers", reason="compares with transformers: pip install 'fp8train[hf]'"
)
transformers.utils.logging.disable_progress_bar()

VOCAB = 61
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.1,
}
_NEOX: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
    "use_parallel_residual": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50.0,  # 4 frequencies that cover the kept, the ramped and the stretched range
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 28,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, untied": ("Llama", _LLAMA),
    "llama, tied, one kv head": (
        "Llama",
        {**_LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    ),
    "llama, llama3 rope": ("Llama", {**_LLAMA, "rope_parameters": _LLAMA3_ROPE}),
    "llama, wide heads, several shard units": (
        "Llama",
        {**_LLAMA, "head_dim": 12, "intermediate_size": 384},
    ),
    "llama, biases": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama, vocabulary needs no padding": ("Llama", {**_LLAMA, "vocab_size": 128}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": None, "rope_theta": 700.0}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2, untied, exact gelu, narrow": (
        "GPT2",
        {**_GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 48},
    ),
    "neox": ("GPTNeoX", _NEOX),
    "neox, tied, tanh": ("GPTNeoX", {**_NEOX, "tie_word_embeddings": True, "hidden_act": "gelu_new"}),
}


def their_model(variant: str, **changes: Any) -> nn.Module:
    """A random model; norms and biases, which start at 1 and 0, get noise so that an error in using them
    shows."""
    family, settings = VARIANTS[variant]
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    torch.manual_seed(11)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """FP32 [B, S, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def tokens_of(vocab_size: int = VOCAB, length: int = 40) -> Tensor:
    """int64 [2, length]."""
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(4))


def write_run(run: Path, config: Config, *, vocab_size: int = VOCAB) -> Decoder:
    """A run directory with one checkpoint of random weights, norms and biases included; returns the model."""
    model = tiny_model(config)
    save_checkpoint(
        run / "checkpoints",
        7,
        {f"master/{name}": parameter.detach().float() for name, parameter in model.named_parameters()},
        meta={"config": to_plain(config), "vocab_size": vocab_size, "tokenizer": None},
        rank_state={},
        group=None,
        keep_last=1,
    )
    return model
