"""Scaled dot-product attention, in the type that a device multiplies in (:mod:`fp8train.kernels.matmul`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.matmul import widens


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None = None,
    in_fp32: bool = False,
) -> Tensor:
    """torch's function of this name; shapes [B, heads, S, D], result in the inputs' dtype. ``in_fp32``: of
    BF16 inputs too, and what backward keeps of the result is not rounded either."""
    dtype = query.dtype
    wide = widens(query) or (in_fp32 and dtype == torch.bfloat16)
    if wide:
        query, key, value = query.float(), key.float(), value.float()
    if query.device.type == "meta":  # shapes only, of the kernel that a GPU runs
        assert attn_mask is None, "attention without values, with a mask"
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, scale=scale)[0]
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, scale=scale
    )
    return mixed.to(dtype) if wide else mixed
