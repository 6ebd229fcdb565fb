"""A decoder block of fused functions, for GPUs: when it can take the place of the layers one by one, and how.

The values are those of :class:`~fp8train.models.block.Block`. Only the sums of the residual stream wait: a
block hands on the stream and the MLP's output, and whoever comes next adds them on the way to its norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.kernels import fused_op
from fp8train.layers.factors import Factors
from fp8train.layers.fused_heads import FusedHeads, fused_heads
from fp8train.layers.fused_mlp import FusedMlp, fused_mlp
from fp8train.layers.fused_norm import FusedNorm
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.models.block import Block


@dataclass(frozen=True)
class FusedBlock:
    """A block that runs as fused functions.

    Attributes:
        block: the layers, whose weights and attention are used.
        heads: what the first function depends on besides tensors.
        mlp: likewise the second.
    """

    block: Block
    heads: FusedHeads
    mlp: FusedMlp

    def __call__(
        self, stream: Tensor, delta: Tensor | None, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Shapes: stream and delta [B, S, H] -> the new stream, and the branch that is to join it; cos/sin
        [S, D/2] or None."""
        block, shape = self.block, stream.shape
        attention, mlp = block.attention, block.mlp
        flat, query, key, value = fused_heads(
            stream.reshape(-1, shape[-1]),
            None if delta is None else delta.reshape(-1, shape[-1]),
            _vectors(block.attention_norm),
            attention.qkv.weight,
            (cos, sin),
            attention.qkv.fused_weights(),
            self.heads,
        )
        mixed = (
            attention.mix(query, key, value)
            if attention.recompute is None
            else attention.recompute(attention.mix, query, key, value)
        )
        attended = attention.out(mixed)
        flat, result = fused_mlp(
            flat,
            attended.view(-1, shape[-1]),
            _vectors(block.mlp_norm),
            (mlp.up.weight, mlp.down.weight),
            (mlp.up.fused_weights(), mlp.down.fused_weights()),
            self.mlp,
        )
        return flat.view(shape), result.view(shape)


def fused_block(block: nn.Module, x: Tensor) -> FusedBlock | None:
    """The block as fused functions for a stream x [B, S, H]; None where its layers have to run one by one:
    on CPUs, in compiled graphs, cut over ranks, with biases, with norms at the end of branches or within
    attention, with factors that a fused function does not know, or while casts are sampled."""
    assert isinstance(block, Block)
    compiled = torch.compiler.is_compiling() or block._compiled_call_impl is not None
    if compiled or not fused_op.fuses(x) or not _is_plain(block):
        return None
    selective = block.attention.recompute is not None
    qkv = block.attention.qkv.fused(keeps_input=not selective)
    up, down = block.mlp.up.fused(keeps_input=not selective), block.mlp.down.fused(keeps_input=not selective)
    if qkv is None or up is None or down is None:
        return None
    attention = block.attention
    heads = FusedHeads(
        _norm(block.attention_norm, casts=qkv.call.plan is not None),
        qkv,
        len(x),
        attention.num_kv_heads,
        attention.head_dim,
    )
    mlp = FusedMlp(
        _norm(block.mlp_norm, casts=up.call.plan is not None), up, block.mlp.fused_activation(), down
    )
    return FusedBlock(block, heads, mlp)


def _is_plain(block: Block) -> bool:
    """Whether the block's parts are such as fused functions compute."""
    attention, mlp = block.attention, block.mlp
    sums = all(
        rule.a == rule.b == 1.0 and not rule.delayed
        for rule in (block.attention_residual, block.mlp_residual)
    )
    recomputes = block.around_norm is attention.recompute and mlp.around_activation is attention.recompute
    plain_attention = (
        attention.query_norm is None and attention.context is None and attention.factors == Factors()
    )
    return block.pre_norm and sums and recomputes and plain_attention and mlp.smooth == "off"


def _vectors(norm: RMSNorm | LayerNorm) -> tuple[Tensor | None, Tensor | None]:
    return norm.weight, norm.bias if isinstance(norm, LayerNorm) else None


def _norm(norm: RMSNorm | LayerNorm, *, casts: bool) -> FusedNorm:
    return FusedNorm("layer" if isinstance(norm, LayerNorm) else "rms", norm.eps, norm.gain_grad, casts)
