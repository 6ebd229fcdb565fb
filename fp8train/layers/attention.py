"""Causal self-attention with grouped key/value heads (GQA; MHA is one query head per group).

The fused projection orders its rows by key/value group: for group g its query heads, then its key, then its
value. A tensor-parallel shard that holds whole groups is therefore a contiguous range of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.kernels.attention import AttentionBackend, scaled_dot_product_attention
from fp8train.kernels.package_kernels import CausalAttention
from fp8train.layers.factors import Factors, scale_backward, scale_forward
from fp8train.layers.linear import Alphas, Linear
from fp8train.layers.qkv import split_heads
from fp8train.layers.wire import wire

_NONE = Factors()
_STANDARD = Alphas()


class KVCache:
    """Keys and values of the tokens seen so far, for one layer's generation.

    Attributes:
        keys: [B, G, capacity, D].
        values: the same.
        length: positions filled.
    """

    def __init__(self, batch: int, groups: int, capacity: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch, groups, capacity, head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, G, S, D] after what is there; returns all keys and values so far."""
        end = self.length + key.shape[2]
        assert end <= self.keys.shape[2], "KV cache is full"
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention: ``out(softmax(q·k / sqrt(D)) · v)``.

    ``logits_scale`` replaces ``1 / sqrt(D)``; ``factors`` multiply the mixed values, and the gradients of
    queries, keys and values. ``qk_norm`` (of width D each) normalise query and key heads before RoPE.

    Attributes:
        qkv: fused projection, rows by group.
        out: projection back into the residual stream.
        kernels: what of torch may compute attention
            (:class:`fp8train.kernels.attention.AttentionBackend`).
        causal: computes whole sequences in torch's place; None leaves them to it.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
        recompute: Callable[..., Tensor] | None = None,
        parallel: TensorParallel | None = None,
        context: ContextParallel | None = None,
        logits_scale: float | None = None,
        factors: Factors = _NONE,
        qk_norm: tuple[nn.Module, nn.Module] | None = None,
        in_fp32: bool = False,
        name: str = "attention",
        qkv_alphas: Alphas = _STANDARD,
        out_alphas: Alphas = _STANDARD,
    ) -> None:
        """``recompute(fn, *args)`` runs ``fn`` under activation checkpointing; None keeps activations.
        Numbers of heads are the model's; with ``parallel`` this rank gets its share. ``context``: ranks with
        the other tokens of each sequence. ``name``: path in the model; ``qkv_alphas`` and ``out_alphas``: the
        linears' multipliers."""
        super().__init__()
        ways = 1 if parallel is None else parallel.size
        assert num_heads % ways == 0 and num_kv_heads % ways == 0, f"{num_heads}/{num_kv_heads} heads, {ways}"
        num_heads, num_kv_heads = num_heads // ways, num_kv_heads // ways
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.recompute, self.context = recompute, context
        self.logits_scale = head_dim**-0.5 if logits_scale is None else logits_scale
        self.factors, self.in_fp32 = factors, in_fp32
        self.kernels: tuple[SDPBackend, ...] = ()
        self.causal: CausalAttention | None = None
        self.query_norm: nn.Module | None
        self.key_norm: nn.Module | None
        self.query_norm, self.key_norm = (None, None) if qk_norm is None else qk_norm
        self.qkv = Linear(
            hidden_size,
            (num_heads + 2 * num_kv_heads) * head_dim,
            bias=bias,
            dtype=dtype,
            device=device,
            name=f"{name}.qkv",
            alphas=qkv_alphas,
            wire=wire("column", parallel),
        )
        self.out = Linear(
            num_heads * head_dim,
            hidden_size,
            bias=bias,
            dtype=dtype,
            device=device,
            name=f"{name}.out",
            alphas=out_alphas,
            wire=wire("row", parallel),
        )

    def use(self, backend: AttentionBackend) -> None:
        """Have ``backend`` compute attention from here on. With context parallelism its calls see a share of
        the heads."""
        ways = 1 if self.context is None else self.context.size
        self.kernels = backend.kernels
        self.causal = backend.causal(
            num_heads=self.num_heads // ways,
            num_kv_heads=self.num_kv_heads // ways,
            head_dim=self.head_dim,
            scale=self.logits_scale,
            device=self.qkv.weight.device,
        )

    @torch.no_grad()
    def query_norms(self) -> Tensor:
        """Spectral norm of each query head's projection, multiplier included: FP32 [heads of this rank]. Its
        growth in a few heads precedes the divergence that a biased attention output causes (arXiv
        2510.04212).
        """
        weight = self.qkv.dequantized_weight(torch.float32)
        heads = weight.view(self.num_kv_heads, -1, self.head_dim, weight.shape[1])[:, :-2].flatten(0, 1)
        gram = heads @ heads.transpose(1, 2)
        finite = gram.isfinite().all(dim=2).all(dim=1)  # others have no norm, and eigenvalues raise
        squared = torch.linalg.eigvalsh(torch.where(finite[:, None, None], gram, 0.0))[:, -1]
        norms = squared.clamp(min=0).sqrt() * self.qkv.alphas.output
        return torch.where(finite, norms, torch.nan)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Shapes: x [B, S, H] -> [B, S, H]; cos/sin [S, D/2] or None for models without RoPE. With tensor
        parallelism x and the result are parts of S, the tables are not."""
        qkv = self.qkv(x)
        if self.recompute is not None and cache is None:
            return self.out(self.recompute(self._attend, qkv, cos, sin))
        return self.out(self._attend(qkv, cos, sin, cache))

    def _attend(
        self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        groups, dim = self.num_kv_heads, self.head_dim
        norms = None
        if self.query_norm is not None and self.key_norm is not None:
            norms = self.query_norm, self.key_norm
        qkv = scale_backward(qkv, self.factors.grad)
        query, key, value = split_heads(qkv, cos, sin, num_kv_heads=groups, head_dim=dim, norms=norms)
        fresh = True
        if cache is not None:
            fresh = cache.length == 0
            key, value = cache.append(key, value)
        if self.context is not None:
            assert cache is None, "generation with context parallelism"
            query, key, value = (self.context.to_heads(x) for x in (query, key, value))
        return self.mix(query, key, value, fresh=fresh, cached=cache is not None)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, *, fresh: bool = True, cached: bool = False
    ) -> Tensor:
        """Attention itself: queries [B, heads, S, D], keys and values [B, G, S', D] -> [B, S, heads·D].
        ``fresh``: the queries are of all tokens, not of new ones after others; ``cached``: keys and values
        are part of a cache, which is torch's to read."""
        length = query.shape[2]
        if self.causal is not None and not cached:
            mixed = self.causal(query, key, value)
        else:
            masked = not fresh and length > 1
            mixed = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=_continued_mask(length, key.shape[2], query.device) if masked else None,
                is_causal=fresh and length > 1,
                enable_gqa=self.num_heads > self.num_kv_heads,
                scale=self.logits_scale,
                in_fp32=self.in_fp32,
                kernels=self.kernels,
            )
        mixed = scale_forward(mixed, self.factors.output)
        if self.context is not None:
            mixed = self.context.to_tokens(mixed)
        return mixed.transpose(1, 2).flatten(2)


def _continued_mask(new: int, total: int, device: torch.device) -> Tensor:
    """True where the i-th of ``new`` tokens, appended to ``total - new`` earlier ones, may look."""
    row = torch.arange(total - new, total, device=device)[:, None]
    return torch.arange(total, device=device)[None, :] <= row
