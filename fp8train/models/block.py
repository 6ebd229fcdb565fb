"""A decoder block: attention, then the MLP, each a branch of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.config.schema import ModelConfig
from fp8train.layers.attention import Attention, KVCache
from fp8train.layers.mlp import MLP
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.models.param_spec import Parametrization

# Functional: wraps a call, not a module, so no parameter changes its name. Nothing here draws random numbers.
recompute: Callable[..., Tensor] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def make_norm(model: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> RMSNorm | LayerNorm:
    """The model's kind of norm over ``hidden_size``."""
    if model.norm == "rmsnorm":
        return RMSNorm(model.hidden_size, eps=model.norm_eps, dtype=dtype, device=device)
    return LayerNorm(model.hidden_size, eps=model.norm_eps, bias=model.bias, dtype=dtype, device=device)


class Block(nn.Module):
    """``x <- a·x + b·attention(norm(x))``, then the same with the MLP.

    With norm placement ``branch_end`` the norm closes the branch instead: ``a·x + b·norm(attention(x))``.
    """

    def __init__(
        self,
        model: ModelConfig,
        parametrization: Parametrization,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        selective_recompute: bool = False,
        parallel: TensorParallel | None = None,
        context: ContextParallel | None = None,
    ) -> None:
        super().__init__()
        inner = recompute if selective_recompute else None
        self.residual = parametrization.residual
        self.pre_norm = parametrization.norm_placement == "pre"
        self.recompute = inner
        self.attention_norm = make_norm(model, dtype, device)
        self.attention = Attention(
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            bias=model.bias,
            dtype=dtype,
            device=device,
            recompute=inner,
            parallel=parallel,
            context=context,
        )
        self.mlp_norm = make_norm(model, dtype, device)
        self.mlp = MLP(
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            activation=model.activation,
            bias=model.bias,
            dtype=dtype,
            device=device,
            recompute=inner,
            parallel=parallel,
        )

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Shapes: x [B, S, H] -> [B, S, H]; cos/sin [S, D/2] or None."""
        if self.pre_norm:
            x = self.residual.join(
                x, self.attention(self._normalise(self.attention_norm, x), cos, sin, cache)
            )
            return self.residual.join(x, self.mlp(self._normalise(self.mlp_norm, x)))
        x = self.residual.join(x, self._normalise(self.attention_norm, self.attention(x, cos, sin, cache)))
        return self.residual.join(x, self._normalise(self.mlp_norm, self.mlp(x)))

    def _normalise(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.recompute is None else self.recompute(norm, x)
