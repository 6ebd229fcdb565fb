"""Causal attention by Transformer Engine's ``DotProductAttention``.

That module has no parameters: it chooses, call by call, between cuDNN's fused attention, FlashAttention where
``flash_attn`` is installed, and matrix products with a softmax between, whose scores are S x S in memory.
:func:`why_not` asks for its choice beforehand and refuses the last, which ``math`` is for.

* **Layout.** Ours is [B, heads, S, D]; TE's ``bshd`` is [B, S, heads, D], its result [B, S, heads·D]. TE
  guesses how three tensors share memory from their addresses and strides, and refuses what it does not know,
  so each is handed over contiguous, in memory of its own.
* **Scale** of the logits is ours, given when the module is made.
* **GQA** by ``num_gqa_groups``; keys and values are not repeated.
* **Determinism.** TE reads ``torch.are_deterministic_algorithms_enabled()`` when the module is made.
* **FP8** attention is off: it needs TE's own autocast and a recipe with ``fp8_dpa``, which ours never have.

BF16 alone: TE computes FP32 only with scores in memory. Heads of up to 256 elements, a multiple of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.te import te

_LENGTH = 128
"""Of the sequences that TE is asked about; its kernels take any."""
_WIDEST_HEAD, _HEAD_MULTIPLE = 256, 8


def why_not(
    *, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, deterministic: bool
) -> str | None:
    """Why TE has no fused kernel for causal attention and its backward pass on the current device, or None.

    Args:
        dtype: of queries, keys and values.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        deterministic: results must not depend on timing.

    Raises:
        RuntimeError: Transformer Engine cannot be imported.
    """
    if dtype != torch.bfloat16:
        return f"its fused kernels compute in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim % _HEAD_MULTIPLE or head_dim > _WIDEST_HEAD:
        return f"heads of {head_dim}: its kernels take multiples of {_HEAD_MULTIPLE} up to {_WIDEST_HEAD}"
    utils = te("pytorch.attention.dot_product_attention.utils")
    by_flash, _, by_cudnn, *_ = utils.get_attention_backend(
        utils.AttentionParams(
            qkv_dtype=dtype,
            qkv_layout="bshd_bshd_bshd",
            batch_size=1,
            num_heads=num_heads,
            num_gqa_groups=num_kv_heads,
            max_seqlen_q=_LENGTH,
            max_seqlen_kv=_LENGTH,
            head_dim_qk=head_dim,
            head_dim_v=head_dim,
            attn_mask_type="causal",
            window_size=(-1, 0),
            bottom_right_diagonal=False,
            deterministic=deterministic,
            is_training=True,
        )
    )
    if by_flash or by_cudnn:
        return None
    kind = "deterministic " if deterministic else ""
    return f"no {kind}fused kernel here for heads of {head_dim} (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 tells why)"


class TeAttention:
    """Causal attention of whole sequences. Not a module of torch: it has no state of ours, and TE's class
    would add an entry to checkpoints."""

    def __init__(
        self, *, num_heads: int, num_kv_heads: int, head_dim: int, scale: float, deterministic: bool
    ) -> None:
        """Make TE's module for these heads of one process; ``scale`` multiplies the logits.

        Raises:
            RuntimeError: Transformer Engine cannot be imported.
        """
        self._attend = te("pytorch").DotProductAttention(
            num_heads,
            head_dim,
            num_gqa_groups=num_kv_heads,
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="causal",
            attention_type="self",
            softmax_scale=scale,
        )
        assert self._attend.deterministic or not deterministic, "made before kernels were deterministic"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, heads, S, D], keys and values [B, groups, S, D], BF16 -> [B, heads, S, D]; in memory
        heads lie within tokens."""
        mixed = self._attend(_alone(query), _alone(key), _alone(value))
        batch, heads, length, dim = query.shape
        return mixed.view(batch, length, heads, dim).transpose(1, 2)


def _alone(x: Tensor) -> Tensor:
    """[B, heads, S, D] as TE's [B, S, heads, D], contiguous at the start of memory of its own."""
    tokens_first = x.transpose(1, 2)
    whole = tokens_first.untyped_storage().nbytes() == tokens_first.numel() * tokens_first.element_size()
    if tokens_first.is_contiguous() and whole:
        return tokens_first
    return tokens_first.clone(memory_format=torch.contiguous_format)
