"""A Llama in the fewest lines of plain torch: what a training loop costs without any framework.

Parameters have the names and shapes of ``transformers``' ``LlamaForCausalLM``, so both take the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.config.schema import Config


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, S, D], halves paired."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings, causal."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]; ``cos`` and ``sin`` [S, head_dim / 2]."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int, kv_heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = Attention(width, heads, kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = MLP(width, inner)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class Output:
    """What ``forward`` returns; ``loss`` in nats per token."""

    loss: Tensor


class PlainLlama(nn.Module):
    """The whole model. ``forward`` has the arguments of ``LlamaForCausalLM`` that a training step uses."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        m = config.model
        assert m.vocab_size is not None
        layers = (
            Layer(m.hidden_size, m.num_heads, m.num_kv_heads, m.ffn_hidden_size, m.norm_eps)
            for _ in range(m.num_layers)
        )
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(m.vocab_size, m.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": nn.RMSNorm(m.hidden_size, m.norm_eps),
            }
        )
        self.lm_head = nn.Linear(m.hidden_size, m.vocab_size, bias=False)
        if m.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        half = m.head_dim // 2
        frequencies = m.rope_theta ** -(torch.arange(half) / half)
        angles = torch.outer(torch.arange(config.data.seq_length), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor, shift_labels: Tensor) -> Output:
        """Mean cross-entropy of [B, S] tokens and targets."""
        del labels
        x = self.model["embed_tokens"](input_ids)
        for layer in self.model["layers"]:
            x = layer(x, self.cos, self.sin)
        logits = self.lm_head(self.model["norm"](x))
        return Output(F.cross_entropy(logits.float().flatten(0, 1), shift_labels.flatten()))
