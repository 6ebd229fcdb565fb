"""The feed-forward half of a block: GELU or SwiGLU.

SwiGLU's gate and up projections are one matrix whose rows alternate in units: unit u holds ``shard_unit``
gate rows, then the same number of up rows. A tensor-parallel shard of whole units is a contiguous range of
rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.kernels import activations, fused_op
from fp8train.layers.factors import Factors, scale
from fp8train.layers.fused_activation import FusedActivation
from fp8train.layers.linear import Alphas, Linear
from fp8train.layers.smooth import channel_scale, token_scale
from fp8train.layers.swiglu import swiglu
from fp8train.layers.wire import wire
from fp8train.numerics.scale import inverse_power_of_two
from fp8train.precision.precision import Smoothing

Activation = Literal["gelu", "gelu_tanh", "swiglu"]
_LARGEST_UNIT = 128
_NONE = Factors()
_STANDARD = Alphas()


def shard_unit(ffn_hidden_size: int) -> int:
    """Rows of gate (and of up) that stay together: the largest power of two up to 128 that divides the
    width."""
    return math.gcd(ffn_hidden_size, _LARGEST_UNIT)


class MLP(nn.Module):
    """The feed-forward network: ``down(activation(up(x)))``; with SwiGLU ``down(silu(gate(x)) · up(x))``.

    Attributes:
        smooth: narrow the range of SwiGLU's output for the down projection (:mod:`fp8train.layers.smooth`);
            set by :meth:`use_smooth_swiglu`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: Activation,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
        around_activation: Callable[..., Tensor] | None = None,
        parallel: TensorParallel | None = None,
        activation_mult: float = 1.0,
        factors: Factors = _NONE,
        name: str = "mlp",
        up_alphas: Alphas = _STANDARD,
        down_alphas: Alphas = _STANDARD,
    ) -> None:
        """``around_activation(fn, x)`` is ``fn(x)`` that keeps something else for backward than autograd
        would: nothing (activation checkpointing), or FP8 codes. None leaves it to autograd.
        ``ffn_hidden_size`` is the model's; with ``parallel`` this rank gets its share. The non-linearity is
        ``f(m·x)/m`` with m = ``activation_mult``, its result and gradient times ``factors``. ``name``: path
        in the model; ``up_alphas`` and ``down_alphas``: the linears' multipliers."""
        super().__init__()
        self.activation: Activation = activation
        self.activation_mult, self.factors = activation_mult, factors
        self.unit = shard_unit(ffn_hidden_size)
        if parallel is not None:
            unit = self.unit if activation == "swiglu" else 1
            assert ffn_hidden_size // unit % parallel.size == 0, f"{ffn_hidden_size} over {parallel.size}"
            ffn_hidden_size //= parallel.size
        self.around_activation, self.parallel = around_activation, parallel
        self.smooth: Smoothing = "off"
        width = 2 * ffn_hidden_size if activation == "swiglu" else ffn_hidden_size
        self.up = Linear(
            hidden_size,
            width,
            bias=bias,
            dtype=dtype,
            device=device,
            name=f"{name}.up",
            alphas=up_alphas,
            wire=wire("column", parallel),
        )
        self.down = Linear(
            ffn_hidden_size,
            hidden_size,
            bias=bias,
            dtype=dtype,
            device=device,
            name=f"{name}.down",
            alphas=down_alphas,
            wire=wire("row", parallel),
        )

    def use_smooth_swiglu(self, smooth: Smoothing) -> None:
        """Narrow the range of SwiGLU's output from now on, for a down projection that runs in FP8 (and with
        ``channel`` casts its weight in forward)."""
        assert self.activation == "swiglu"
        self.smooth = smooth

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [B, S, H] -> [B, S, H]; with tensor parallelism S is this rank's part."""
        up = self.up(x)
        around = self.around_activation
        activated = self._activate(up) if around is None else around(self._activate, up)
        if self.smooth == "off" or self.down.leaves_fp8:
            return self.down(activated)
        if self.smooth == "channel":
            factors = channel_scale(activated, self.parallel)
            inverse = inverse_power_of_two(factors).to(up.dtype)
            return self.down(activated * inverse, columns=factors.to(up.dtype))
        scale = token_scale(up.unflatten(-1, (-1, 2, self.unit))[..., 1, :].flatten(-2), self.parallel)
        inverse = inverse_power_of_two(scale).to(up.dtype)
        return self.down(activated * inverse) * self._part(scale).to(up.dtype)

    def _part(self, scale: Tensor) -> Tensor:
        """Of whole sequences [B, S, 1], the tokens that the down projection returns on this rank."""
        if self.parallel is None or self.parallel.size == 1:
            return scale
        return scale.chunk(self.parallel.size, dim=1)[self.parallel.rank]

    def fused_activation(self) -> FusedActivation:
        """The non-linearity as GPUs run it."""
        factors, mult = self.factors, self.activation_mult
        if self.activation == "swiglu":
            values, gradient, settings = activations.swiglu, activations.swiglu_grad, (self.unit, mult)
        else:
            tanh = self.activation == "gelu_tanh"
            values, gradient, settings = activations.gelu, activations.gelu_grad, (tanh, mult)
        return FusedActivation(values, gradient, settings, factors.output, factors.grad)

    def _activate(self, up: Tensor) -> Tensor:
        mult = self.activation_mult
        if fused_op.fuses_now(up):
            return self.fused_activation()(up)
        if self.activation == "swiglu":
            return swiglu(up, unit=self.unit, mult=mult, factors=self.factors)
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        activated = F.gelu(up if mult == 1.0 else up * mult, approximate=approximate)
        return scale(activated if mult == 1.0 else activated * (1 / mult), self.factors)
