"""A decoder block: attention, then the MLP, each a branch of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.config.linear_names import linear_dimensions
from fp8train.layers.attention import Attention, KVCache
from fp8train.layers.fp8_saved import from_fp8_input
from fp8train.layers.linear import Linear
from fp8train.layers.mlp import MLP
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.layers.residual import ResidualRule
from fp8train.models.parametrization import Parametrization

# Functional: wraps a call, not a module, so no parameter changes its name. Nothing here draws random numbers.
recompute: Callable[..., Tensor] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def make_norm(
    parametrization: Parametrization, dtype: torch.dtype, device: torch.device | None
) -> RMSNorm | LayerNorm:
    """Make a norm of the model's kind over ``hidden_size``, its values uninitialised."""
    model, grad = parametrization.model, parametrization.vector_grad()
    size, eps, gain = model.hidden_size, model.norm_eps, model.norm_gain
    if model.norm == "rmsnorm":
        return RMSNorm(size, eps=eps, dtype=dtype, device=device, gain=gain, gain_grad=grad)
    return LayerNorm(size, eps=eps, bias=model.bias, dtype=dtype, device=device, gain=gain, gain_grad=grad)


def _qk_norms(
    parametrization: Parametrization, dtype: torch.dtype, device: torch.device | None
) -> tuple[RMSNorm, RMSNorm] | None:
    """Norms of query and key heads, if the model has them."""
    model, grad = parametrization.model, parametrization.vector_grad()
    if model.qk_norm == "none":
        return None
    size, eps, gain = model.head_dim, model.norm_eps, model.qk_norm == "gain"
    query, key = (
        RMSNorm(size, eps=eps, dtype=dtype, device=device, gain=gain, gain_grad=grad) for _ in range(2)
    )
    return query, key


class Block(nn.Module):
    """A decoder block: ``x <- a·x + b·attention(norm(x))``, then the same with the MLP.

    With norm placement ``branch_end`` the norm closes the branch instead: ``a·x + b·norm(attention(x))``.
    What a, b and the multipliers inside are is the parametrisation's choice.

    Attributes:
        one_by_one: its layers run as modules even where fused functions could take their place
            (:mod:`fp8train.models.fused_block`): who gathers weights module by module must see them run.
    """

    def __init__(
        self,
        index: int,
        parametrization: Parametrization,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        selective_recompute: bool = False,
        fp8_saved: bool = False,
        parallel: TensorParallel | None = None,
        context: ContextParallel | None = None,
    ) -> None:
        """``index``: of the block in the whole model; ``selective_recompute``: of norms, non-linearities and
        attention; ``fp8_saved``: backward of norms and non-linearities keeps their input in FP8; one of the
        two at most. ``parallel`` and ``context`` as for the decoder."""
        super().__init__()
        assert not (selective_recompute and fp8_saved), "what is recomputed is not kept"
        inner = recompute if selective_recompute else None
        around = from_fp8_input if fp8_saved else inner
        model, attention = parametrization.model, parametrization.attention()
        alphas = {name: parametrization.linear(*fans) for name, fans in linear_dimensions(model).items()}
        self.one_by_one = False
        self.attention_residual = parametrization.residual(2 * index)
        self.mlp_residual = parametrization.residual(2 * index + 1)
        self.pre_norm = model.norm_placement == "pre"
        self.around_norm = around
        self.attention_norm = make_norm(parametrization, dtype, device)
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
            logits_scale=attention.logits_scale,
            factors=attention.factors,
            qk_norm=_qk_norms(parametrization, dtype, device),
            in_fp32=model.attention_in_fp32,
            name=f"layers.{index}.attention",
            qkv_alphas=alphas["attention.qkv"],
            out_alphas=alphas["attention.out"],
        )
        self.mlp_norm = make_norm(parametrization, dtype, device)
        self.mlp = MLP(
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            activation=model.activation,
            bias=model.bias,
            dtype=dtype,
            device=device,
            around_activation=around,
            parallel=parallel,
            activation_mult=parametrization.settings.activation_mult,
            factors=parametrization.activation(),
            name=f"layers.{index}.mlp",
            up_alphas=alphas["mlp.up"],
            down_alphas=alphas["mlp.down"],
        )

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        """Its matrices, in order."""
        return self.attention.qkv, self.attention.out, self.mlp.up, self.mlp.down

    @property
    def compiled(self) -> bool:
        """Whether calls run compiled code."""
        return self._compiled_call_impl is not None

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Shapes: x [B, S, H] -> [B, S, H]; cos/sin [S, D/2] or None."""
        attend = partial(self.attention, cos=cos, sin=sin, cache=cache)
        x = self._branch(self.attention_residual, self.attention_norm, attend, x)
        return self._branch(self.mlp_residual, self.mlp_norm, self.mlp, x)

    def _branch(
        self, residual: ResidualRule, norm: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        start = residual.enter(x)
        if self.pre_norm:
            return residual.join(x, function(self._normalise(norm, start)))
        return residual.join(x, self._normalise(norm, function(start)))

    def _normalise(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.around_norm is None else self.around_norm(norm, x)
