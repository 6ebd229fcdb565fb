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
from fp8train.numerics.quant_spec import QuantSpec


@dataclass(frozen=True)
class ScaledTensor:
    """FP8 payload with its inverse scale.

    Attributes:
        payload: FP8 tensor.
        scale_inv: FP32; a scalar for per-tensor scales.
        spec: how it was quantised.
    """

    payload: Tensor
    scale_inv: Tensor
    spec: QuantSpec

    @classmethod
    def from_tensor(cls, x: Tensor, spec: QuantSpec) -> ScaledTensor:
        """Quantise ``x`` with its own scale."""
        payload, scale_inv = quantize(x, spec)
        return cls(payload, scale_inv, spec)

    def to_tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values it stands for."""
        return uncast(self.payload, self.scale_inv, dtype)


def _flatten(value: ScaledTensor) -> tuple[list[Any], QuantSpec]:
    return [value.payload, value.scale_inv], value.spec


def _unflatten(children: Any, spec: QuantSpec) -> ScaledTensor:
    payload, scale_inv = children
    return ScaledTensor(payload, scale_inv, spec)


pytree.register_pytree_node(ScaledTensor, _flatten, _unflatten, serialized_type_name="fp8train.ScaledTensor")
