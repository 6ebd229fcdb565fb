"""A decoder block of fused functions, for GPUs: when it can take the place of the layers one by one, and how.

The values are those of :class:`~fp8train.models.block.Block`. Only the sums of the residual stream wait: a
block hands on the stream and the MLP's output, and whoever comes next adds them on the way to its norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fp8train.kernels import fused_op
from fp8train.layers.factors import Factors
from fp8train.layers.fused_heads import FusedHeads, fused_heads
from fp8train.layers.fused_mlp import FusedMlp, fused_mlp
from fp8train.layers.fused_norm import FusedNorm
from fp8train.layers.fused_projection import FusedProjection, fused_projection
from fp8train.layers.gradient_amax import GradientAmax
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.models.block import Block


@dataclass(frozen=True)
class FusedBlock:
    """A block that runs as fused functions.

    Attributes:
        block: the layers, whose weights and attention are used.
        heads: what the first function depends on besides tensors.
        out: likewise attention's output projection.
        mlp: likewise the second half.
    """

    block: Block
    heads: FusedHeads
    out: FusedProjection
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
        attended = fused_projection(
            mixed.reshape(-1, attention.out.in_features),
            attention.out.weight,
            attention.out.fused_weights(),
            self.out,
        )
        flat, result = fused_mlp(
            flat,
            attended,
            _vectors(block.mlp_norm),
            (mlp.up.weight, mlp.down.weight),
            (mlp.up.fused_weights(), mlp.down.fused_weights()),
            self.mlp,
        )
        return flat.view(shape), result.view(shape)


def can_fuse(block: Block) -> bool:
    """Whether fused functions compute this block on its device, once its linears are connected: on every step
    whose casts are not sampled."""
    on_gpu = not block.one_by_one and fused_op.fuses(block.attention.qkv.weight)
    return on_gpu and _is_plain(block) and all(linear.fuses for linear in block.linears)


def fused_block(block: nn.Module, x: Tensor, delta_amax: GradientAmax | None = None) -> FusedBlock | None:
    """The block as fused functions for a stream x [B, S, H]; None where its layers have to run one by one:
    on CPUs, cut over ranks, with biases, with norms of another package, at the end of branches or within
    attention, with factors that a fused function does not know, or while casts are sampled. ``delta_amax``:
    the :attr:`~fp8train.layers.fused_mlp.FusedMlp.out_amax` of the branch that is to join the stream."""
    assert isinstance(block, Block)
    if not can_fuse(block):
        return None
    selective = block.attention.recompute is not None
    qkv = block.attention.qkv.fused(keeps_input=not selective)
    up, down = block.mlp.up.fused(keeps_input=not selective), block.mlp.down.fused(keeps_input=not selective)
    attention, attended_amax = block.attention, GradientAmax()
    out = attention.out.fused()
    if qkv is None or out is None or up is None or down is None:
        return None
    heads = FusedHeads(
        _norm(block.attention_norm, casts=qkv.call.plan is not None),
        qkv,
        len(x),
        attention.num_kv_heads,
        attention.head_dim,
        delta_amax,
    )
    mlp = FusedMlp(
        _norm(block.mlp_norm, casts=up.call.plan is not None),
        up,
        block.mlp.fused_activation(),
        down,
        attended_amax,
        GradientAmax(),
    )
    return FusedBlock(block, heads, FusedProjection(out, attended_amax), mlp)


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
    norms = block.attention_norm.backend.fuses and block.mlp_norm.backend.fuses
    return block.pre_norm and norms and sums and recomputes and plain_attention and mlp.smooth == "off"


def _vectors(norm: RMSNorm | LayerNorm) -> tuple[Tensor | None, Tensor | None]:
    return norm.weight, norm.bias if isinstance(norm, LayerNorm) else None


def _norm(norm: RMSNorm | LayerNorm, *, casts: bool) -> FusedNorm:
    return FusedNorm("layer" if isinstance(norm, LayerNorm) else "rms", norm.eps, norm.gain_grad, casts)
