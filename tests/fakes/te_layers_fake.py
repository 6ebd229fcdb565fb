"""TE's norms and ``DotProductAttention`` for the fake, in float64 and rounded once.

Norms as in ``csrc/extensions/normalization.cpp`` and ``pybind.cpp``: forward with named arguments in this
order, backward by position. Attention as in ``attention/dot_product_attention`` of TE 2.20: its constructor,
what its forward asserts, and which memory layouts ``get_qkv_layout`` knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.fakes import exact_norm
from tests.fakes.transformer_engine_fake import DType, Part, Recorder, TE_DType


def _matrix(x: Tensor, weight: Tensor, *others: Tensor | None) -> None:
    assert x.dim() == 2 and x.is_contiguous(), "x must be 2D tensor."
    for vector in (weight, *others):
        if vector is not None:
            assert vector.shape == x.shape[1:] and vector.dtype == x.dtype, "kernels of one type alone"


def _settings(sm_margin: int, zero_centered_gamma: bool) -> None:
    assert type(sm_margin) is int and sm_margin == 0
    assert zero_centered_gamma is False, "would multiply by 1 + weight"


def _saved(dz: Tensor, x: Tensor, gamma: Tensor, *statistics: Tensor) -> None:
    _matrix(x, gamma)
    assert dz.shape == x.shape and dz.dtype == gamma.dtype
    for one in statistics:
        assert one.dtype == torch.float32 and one.shape == x.shape[:1]


def norms(recorder: Recorder) -> dict[str, dict[str, Any]]:
    """A :data:`Part`: the four functions, as ``pytorch.cpp_extensions`` re-exports them."""

    def layernorm_fwd(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        ln_out: Tensor | None,
        quantizer: object,
        otype: DType,
        sm_margin: int,
        zero_centered_gamma: bool,
    ) -> list[Tensor]:
        recorder.note("layernorm_fwd")
        _matrix(input, weight, bias)
        _settings(sm_margin, zero_centered_gamma)
        assert ln_out is None and quantizer is None and otype == TE_DType[input.dtype]
        y, mean, rsigma = exact_norm.forward(input, weight, bias, eps, centred=True)
        return [y.to(input.dtype), mean.float(), rsigma.float()]

    def layernorm_bwd(
        dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero: bool, /
    ) -> list[Tensor]:
        recorder.note("layernorm_bwd")
        _saved(dz, x, gamma, mu, rsigma)
        _settings(sm_margin, zero)
        return [g.to(x.dtype) for g in exact_norm.backward(dz, x, mu, rsigma, gamma)]

    def rmsnorm_fwd(
        input: Tensor,
        weight: Tensor,
        eps: float,
        ln_out: Tensor | None,
        quantizer: object,
        otype: DType,
        sm_margin: int,
        zero_centered_gamma: bool,
    ) -> list[Tensor | None]:
        recorder.note("rmsnorm_fwd")
        _matrix(input, weight)
        _settings(sm_margin, zero_centered_gamma)
        assert ln_out is None and quantizer is None and otype == TE_DType[input.dtype]
        y, _, rsigma = exact_norm.forward(input, weight, None, eps, centred=False)
        return [y.to(input.dtype), None, rsigma.float()]

    def rmsnorm_bwd(
        dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero: bool, /
    ) -> list[Tensor]:
        recorder.note("rmsnorm_bwd")
        _saved(dz, x, gamma, rsigma)
        _settings(sm_margin, zero)
        return [g.to(x.dtype) for g in exact_norm.backward(dz, x, None, rsigma, gamma)[:2]]

    functions = (layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd)
    return {"pytorch.cpp_extensions": {function.__name__: function for function in functions}}


@dataclass
class AttentionParams:
    """The fields of TE's that we set, without its defaults; another one is an error."""

    qkv_dtype: torch.dtype
    qkv_layout: str
    batch_size: int
    num_heads: int
    num_gqa_groups: int
    max_seqlen_q: int
    max_seqlen_kv: int
    head_dim_qk: int
    head_dim_v: int
    attn_mask_type: str
    window_size: tuple[int, int]
    bottom_right_diagonal: bool
    deterministic: bool
    is_training: bool


class DotProductAttention(nn.Module):
    """Causal attention of ``bshd``. Has the state that makes it unfit for checkpoints of ours."""

    recorder: Recorder

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        *,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.dim = num_attention_heads, kv_channels
        self.groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        assert self.heads % self.groups == 0
        assert attention_dropout == 0.0 and attention_type == "self"
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.softmax_scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.deterministic = torch.are_deterministic_algorithms_enabled()

    def get_extra_state(self) -> Tensor:
        return torch.zeros(1)

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        self.recorder.note("attention", scale=self.softmax_scale)
        tensors = (query_layer, key_layer, value_layer)
        _layout_is_known(*tensors)
        assert {tensor.dtype for tensor in tensors} in ({torch.bfloat16}, {torch.float16}), "a fused kernel"
        if self.qkv_format == "sbhd":
            tensors = tuple(tensor.transpose(0, 1) for tensor in tensors)
        query, key, value = (tensor.double().transpose(1, 2) for tensor in tensors)
        assert query.shape[1] == self.heads and key.shape[1] == value.shape[1] == self.groups
        assert query.shape[3] == key.shape[3] == value.shape[3] == self.dim
        key, value = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * self.softmax_scale
        if self.attn_mask_type == "causal":
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2).to(query_layer.dtype)
        return mixed if self.qkv_format == "bshd" else mixed.transpose(0, 1)


def _layout_is_known(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three tensors of their own, ``bshd_bshd_bshd``: what we mean to hand over. Others that TE knows are
    views of a packed buffer, by a detection that it deprecates."""
    for tensor in (query, key, value):
        assert tensor.dim() == 4 and tensor.is_contiguous() and tensor.storage_offset() == 0
    addresses = {tensor.untyped_storage().data_ptr() for tensor in (query, key, value)}
    assert len(addresses) == 3, "tensors that share memory"


def attention(*, by_flash: bool = False, by_cudnn: bool = True) -> Part:
    """A :data:`Part`: the module, and the choice that TE makes between kernels."""

    def part(recorder: Recorder) -> dict[str, dict[str, Any]]:
        def get_attention_backend(attention_params: AttentionParams) -> tuple[Any, ...]:
            recorder.note("get_attention_backend", **vars(attention_params))
            chosen = [by_flash, by_cudnn, True]
            return (
                by_flash and not by_cudnn,
                None,
                by_cudnn,
                1 if by_cudnn else None,
                not (by_flash or by_cudnn),
                chosen,
            )

        module = type("DotProductAttention", (DotProductAttention,), {"recorder": recorder})
        choice = {"AttentionParams": AttentionParams, "get_attention_backend": get_attention_backend}
        return {
            "pytorch": {"DotProductAttention": module},
            "pytorch.attention.dot_product_attention.utils": choice,
        }

    return part
