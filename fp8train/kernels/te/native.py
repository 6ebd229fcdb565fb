"""Linears that are Transformer Engine's own, under its autocast: the baseline to compare ours with.

The module here is ``transformer_engine.pytorch.Linear`` around the memory of a weight of ours: same names,
same initial values, same checkpoints. It casts, multiplies, and keeps for backward what its recipe says, and
casts the weight anew when that changed (``is_first_microbatch``), as a training loop of its own would have
it. Its weight gradient comes back in the compute type, and is handed on by a hook.

Its recipe is chosen in :func:`fp8train.precision.transformer_engine.native_recipe`. The autocast has to span
the forward of the whole model: histories of delayed scales move on when it ends, for every micro-batch, and
those of gradients when backward ends. Scales of delayed scaling are in no checkpoint of ours: a run that goes
on begins with a scale of 1, as a new one does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.kernels.te import te
from fp8train.precision.transformer_engine import NativeRecipe

_QPARAMS = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")


def make_recipe(native: NativeRecipe) -> Any:
    """TE's object for a recipe."""
    recipes = te("common.recipe")
    options: dict[str, Any] = dict(native.options)
    if "fp8_format" in options:
        options["fp8_format"] = getattr(recipes.Format, options["fp8_format"])
    recipe = getattr(recipes, native.name)(**options)
    for name in _QPARAMS if native.power_of_two is not None else ():
        setattr(recipe, name, recipes.QParams(power_2_scale=native.power_of_two))
    return recipe


def autocast(recipe: Any) -> AbstractContextManager[Any]:
    """What the forward of a model whose linears are :class:`NativeLinear` runs in, once for a micro-batch."""
    context: AbstractContextManager[Any] = te("pytorch").autocast(enabled=True, recipe=recipe)
    return context


class NativeLinear:
    """``x @ weight.T`` by TE's module, for a weight that is somebody else's parameter."""

    def __init__(self, weight: nn.Parameter, hand_over: Callable[[Tensor], None]) -> None:
        """Args: ``weight``: [N, K], whose memory the module reads; ``hand_over``: takes the weight's gradient
        of each micro-batch, in its dtype."""
        out_features, in_features = weight.shape
        self._module = te("pytorch").Linear(
            in_features, out_features, bias=False, params_dtype=weight.dtype, device=weight.device
        )
        self._own: nn.Parameter = self._module.weight
        self._own.requires_grad_(weight.requires_grad)
        self._own.register_post_accumulate_grad_hook(self._received)
        self._hand_over = hand_over
        self._cast_of: tuple[int, int, bool] | None = None

    def _received(self, own: Tensor) -> None:
        gradient, own.grad = own.grad, None
        assert gradient is not None
        self._hand_over(gradient)

    def forget(self) -> None:
        """Make the next call cast the weight."""
        self._cast_of = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Shapes: x [T, K] -> [T, N]. ``weight``: the one that this was made for, wherever it lies by now."""
        if self._own.data_ptr() != weight.data_ptr():
            self._own.data = weight.detach()
        state = weight.data_ptr(), weight._version, torch.is_grad_enabled()
        changed = state != self._cast_of
        self._cast_of = state
        y: Tensor = self._module(x, is_first_microbatch=changed)
        return y
