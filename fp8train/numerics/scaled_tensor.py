"""A quantised tensor as a value: payload, scale_inv and how it was made.

``value = payload · scale_inv``. A frozen dataclass registered as a pytree, not a tensor subclass: nothing
dispatches behind the reader's back. Autograd functions, custom operators, collectives and checkpoints take
the raw tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fp8train.numerics.cast import quantize, uncast
from fp8train.numerics.granularity import expand_scales
from fp8train.precision.operand_cast import QuantSpec


@dataclass(frozen=True)
class ScaledTensor:
    """An FP8 payload with the inverse scale that gives its codes their values, ``payload · scale_inv``.

    Attributes:
        payload: FP8 tensor.
        scale_inv: FP32; a scalar for per-tensor scales, else 2-D, as
            :mod:`fp8train.numerics.granularity` says.
        spec: how it was quantised.
    """

    payload: Tensor
    scale_inv: Tensor
    spec: QuantSpec

    @classmethod
    def from_tensor(cls, x: Tensor, spec: QuantSpec, *, contracted: int = 1) -> ScaledTensor:
        """Quantise ``x`` with its own scales, for a GEMM that contracts dimension ``contracted``."""
        payload, scale_inv = quantize(x, spec, contracted=contracted)
        return cls(payload, scale_inv, spec)

    def to_tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode to ``dtype``: the values that the payload stands for."""
        return uncast(self.payload, expand_scales(self.scale_inv, self.payload.shape), dtype)


def _flatten(value: ScaledTensor) -> tuple[list[Any], QuantSpec]:
    return [value.payload, value.scale_inv], value.spec


def _unflatten(children: Any, spec: QuantSpec) -> ScaledTensor:
    payload, scale_inv = children
    return ScaledTensor(payload, scale_inv, spec)


pytree.register_pytree_node(ScaledTensor, _flatten, _unflatten, serialized_type_name="fp8train.ScaledTensor")
