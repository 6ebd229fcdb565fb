"""Makes the optimizer that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fp8train.models.param_spec import ParamSpec
from fp8train.optim.adamw import AdamW, AdamWSettings
from fp8train.optim.lion import Lion
from fp8train.optim.optimizer import Optimizer, OptimizerSettings
from fp8train.optim.parameter_state import Region
from fp8train.optim.weight_target import WeightTarget
from fp8train.precision.state_formats import StateFormats

_RULES: dict[str, type[Optimizer]] = {"adamw": AdamW, "lion": Lion}


def make_optimizer(
    name: Literal["adamw", "lion"],
    parameters: Mapping[str, Tensor],
    specs: Mapping[str, ParamSpec],
    settings: OptimizerSettings,
    plan: StateFormats,
    *,
    seed: int,
    weight_targets: Mapping[str, WeightTarget] | None = None,
    regions: Mapping[str, Region] | None = None,
    agree: Callable[[Tensor], None] | None = None,
    device: torch.device | None = None,
) -> Optimizer:
    """Construct an optimizer; see :class:`~fp8train.optim.optimizer.Optimizer` for the arguments.

    Args:
        name: update rule.
        settings: :class:`~fp8train.optim.adamw.AdamWSettings` for AdamW,
            :class:`~fp8train.optim.optimizer.OptimizerSettings` for Lion, which has no ``eps``.
        plan: with a second moment for AdamW, without for Lion.

    Raises:
        ValueError: unknown name; a plan that does not match it.
    """
    if name not in _RULES:
        raise ValueError(f"optimizer.name: {name!r}; legal: {', '.join(_RULES)}")
    assert isinstance(settings, AdamWSettings) == (name == "adamw"), f"{name} with {type(settings).__name__}"
    return _RULES[name](
        parameters,
        specs,
        settings,
        plan,
        seed=seed,
        weight_targets=weight_targets,
        regions=regions,
        agree=agree,
        device=device,
    )
