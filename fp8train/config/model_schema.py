"""The ``model`` section: the decoder's sizes and its architectural choices.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fp8train.config.limits import Context, Layers, MlpWidth, Vocabulary, Width
from fp8train.config.section import PositiveFloat, Section, contradiction


class RopeScalingConfig(Section):
    """Llama-3 frequency scaling of rotary positions."""

    factor: PositiveFloat = 8.0
    """Long wavelengths are stretched by this factor."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above ``original_max_seq_len / low_freq_factor`` are stretched fully."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below ``original_max_seq_len / high_freq_factor`` are kept."""
    original_max_seq_len: Context = 8192
    """Context of the unscaled model."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScalingConfig:
        if self.high_freq_factor <= self.low_freq_factor:
            raise contradiction(
                f"high_freq_factor ({self.high_freq_factor:g}) must be larger than low_freq_factor "
                f"({self.low_freq_factor:g})",
                "high_freq_factor",
                "low_freq_factor",
            )
        return self


class ModelConfig(Section):
    """The decoder. ``family`` fills norm, activation, positions, bias and tying; every one of them can be set
    alone."""

    family: Literal["gpt", "llama"] = Field(examples=["llama"])
    """``gpt``: LayerNorm, GELU, biases, learned positions, tied head. ``llama``: RMSNorm, SwiGLU, RoPE, no
    biases, untied."""
    num_layers: Layers = Field(examples=[12])
    """Number of decoder blocks."""
    hidden_size: Width = Field(examples=[768])
    """Width of the residual stream."""
    num_heads: Width = Field(examples=[12])
    """Query heads."""
    num_kv_heads: Width
    """Key/value heads (GQA); default ``num_heads``."""
    head_dim: Width
    """Width of a head; default ``hidden_size / num_heads``."""
    ffn_hidden_size: MlpWidth
    """Width of the MLP; default ``4 * hidden_size`` (gpt) or ``8/3 * hidden_size`` rounded up to 256
    (llama)."""
    vocab_size: Vocabulary | None = None
    """Vocabulary, before padding; default: the tokenizer's."""
    vocab_multiple: Vocabulary = 128
    """The embedding is padded to a multiple of this; padded logits never win."""
    max_seq_len: Context
    """Longest context; default ``data.seq_length``. Sizes the learned position table."""
    positions: Literal["rope", "learned"]
    """Position information."""
    norm: Literal["layernorm", "rmsnorm"]
    """Normalisation."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance."""
    norm_gain: bool = True
    """Norms have a learned gain (and LayerNorm a bias, with ``bias``); ``umup`` writes false."""
    norm_placement: Literal["pre", "branch_end"] = "pre"
    """``pre``: normalise what enters a branch; ``branch_end``: what leaves it, before it joins the stream."""
    qk_norm: Literal["none", "gain", "frozen"] = "none"
    """RMSNorm of every query and key head before RoPE: ``gain`` with one learned vector each per layer,
    ``frozen`` without. ``frozen`` with ``norm_placement: branch_end`` keeps FP8 attention free of outliers
    (FOG)."""
    attention_in_fp32: bool = False
    """Compute attention in FP32, output included until backward is done with it: removes the bias of a BF16
    output that can end in a diverging W_Q (arXiv 2510.04212); costs time and memory."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    """MLP non-linearity; ``swiglu`` adds the gate projection."""
    bias: bool
    """Biases on linears (and on LayerNorm)."""
    tie_embeddings: bool
    """Share the embedding with the output head."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Llama-3 rotary scaling; none by default."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of weights at initialisation; projections into the residual stream get
    ``init_std / sqrt(2 * num_layers)``."""

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise contradiction(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
                "num_kv_heads",
                "num_heads",
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise contradiction(
                f"head_dim ({self.head_dim}) must be even for positions: rope", "head_dim", "positions"
            )
        return self
