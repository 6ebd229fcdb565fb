"""TE's ``Linear``, ``autocast`` and recipes for the fake.

Operands have one scale each from their own amax whatever the recipe, products are of float64: what is checked
is how the module is called. It refuses a forward outside an autocast, another dtype, sizes that FP8 does not
take, and a cached weight that is not the weight any more.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, nn

from tests.fakes.te_quantizer_fake import amax_without_nan, encode, scale_from_amax
from tests.fakes.transformer_engine_fake import DType, Recorder, decode


class Format(enum.Enum):
    E4M3 = 1
    E5M2 = 2
    HYBRID = 3


class QParams:
    def __init__(self, power_2_scale: bool = False) -> None:
        self.power_2_scale = power_2_scale


class Recipe:
    known: tuple[str, ...] = ("fp8_format",)

    def __init__(self, **options: Any) -> None:
        unknown = set(options) - set(self.known)
        assert not unknown, f"{type(self).__name__} has no {unknown}"
        assert isinstance(options.get("fp8_format", Format.E4M3), Format)
        self.options = options
        self.fp8_quant_fwd_inp = self.fp8_quant_fwd_weight = self.fp8_quant_bwd_grad = QParams()


class DelayedScaling(Recipe):
    known = ("margin", "fp8_format", "amax_history_len", "amax_compute_algo")


class Float8CurrentScaling(Recipe):
    known = ("use_power_2_scales", "fp8_format")


class Float8BlockScaling(Recipe):
    known = ("use_f32_scales", "fp8_format")


class MXFP8BlockScaling(Recipe):
    pass


class NVFP4BlockScaling(Recipe):
    known = ()


RECIPES = (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling)


def quantised(x: Tensor, dtype: DType, *, power_of_two: bool) -> Tensor:
    """Float64 values of x after a cast with its own scale."""
    scale = scale_from_amax(amax_without_nan(x).view(1), dtype, power_of_two=power_of_two, epsilon=0.0)
    return decode(encode(x.float() * scale, dtype), dtype) / scale.double()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, w: Tensor, recipe: Recipe) -> Tensor:
        pow2 = recipe.fp8_quant_fwd_inp.power_2_scale
        cast = quantised(x, DType.kFloat8E4M3, power_of_two=pow2)
        ctx.save_for_backward(cast, w)
        ctx.recipe, ctx.dtype = recipe, x.dtype
        return (cast @ w.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cast, w = ctx.saved_tensors
        hybrid = ctx.recipe.options.get("fp8_format") == Format.HYBRID
        dtype = DType.kFloat8E5M2 if hybrid else DType.kFloat8E4M3
        pow2 = ctx.recipe.fp8_quant_bwd_grad.power_2_scale
        g = quantised(grads[0].contiguous(), dtype, power_of_two=pow2)
        return (g @ w).to(ctx.dtype), (g.t() @ cast).to(ctx.dtype), None, None


def fake(recorder: Recorder) -> dict[str, dict[str, Any]]:
    """The part for :func:`tests.fakes.transformer_engine_fake.install`."""
    active: list[Recipe] = []

    class autocast:
        def __init__(
            self, enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None
        ) -> None:
            assert enabled and not calibrating and isinstance(recipe, Recipe)
            self.recipe = recipe

        def __enter__(self) -> None:
            assert not active, "histories move on when the outermost one ends: it is to span a whole forward"
            recorder.note("autocast", recipe=self.recipe)
            active.append(self.recipe)

        def __exit__(self, *error: Any) -> None:
            active.pop()

    class Linear(nn.Module):
        def __init__(
            self,
            in_features: int,
            out_features: int,
            *,
            bias: bool = True,
            params_dtype: torch.dtype | None = None,
            device: torch.device | str = "cuda",
        ) -> None:
            super().__init__()
            assert not bias
            assert in_features % 16 == 0 and out_features % 8 == 0
            self.weight = nn.Parameter(
                torch.randn(out_features, in_features, dtype=params_dtype, device=device)
            )
            self._cached: tuple[Tensor, Tensor] | None = None

        def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
            assert active, "outside an autocast it multiplies in high precision"
            assert x.dtype == self.weight.dtype and x.dim() == 2 and x.shape[0] % 8 == 0
            recorder.note("Linear", first=is_first_microbatch, trains=torch.is_grad_enabled())
            if is_first_microbatch is not False or self._cached is None:
                pow2 = active[0].fp8_quant_fwd_weight.power_2_scale
                w = quantised(self.weight.detach(), DType.kFloat8E4M3, power_of_two=pow2)
                self._cached = self.weight.detach().clone(), w
            assert torch.equal(self._cached[0], self.weight), "a cached cast of another weight"
            y: Tensor = _Product.apply(x, self.weight, self._cached[1], active[0])
            return y

    recipes = {"Format": Format, "QParams": QParams} | {kind.__name__: kind for kind in RECIPES}
    return {"pytorch": {"Linear": Linear, "autocast": autocast}, "common.recipe": recipes}
