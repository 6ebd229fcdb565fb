"""What the tests of optimizer states share: parameters, gradients like those of training, an FP64 AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.models.param_spec import ParamSpec
from fp8train.optim.gradient import TensorGradient
from fp8train.optim.optimizer import Optimizer
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamWSettings
from fp8train.update_rules.rule import Rule, RuleSettings

SETTINGS = AdamWSettings(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

FP16_MASTER = StateFormat("fp16_scaled", rounding="stochastic")
O1 = StateFormats(master=FP16_MASTER)
O2 = StateFormats(FP16_MASTER, StateFormat("e4m3"), StateFormat("fp16_scaled"))
PAPER = StateFormats(
    StateFormat("fp16_scaled", granularity="tensor"),
    StateFormat("e4m3", granularity="tensor"),
    StateFormat("fp16_scaled", granularity="tensor"),
)
_EXPANDED = StateFormat("e4m3", expand=True)
COAT = StateFormats(FP16_MASTER, _EXPANDED, _EXPANDED)
"""``precision.state.plan: coat`` at O1 to O3."""
E4M3_E5M2 = StateFormats(
    StateFormat("fp16_scaled", granularity="tensor"),
    StateFormat("e4m3", granularity="tensor"),
    StateFormat("e5m2", granularity="tensor"),
)


def matrix_spec(
    fqn: str, shape: tuple[int, ...], *, in_fp8_plan: bool = True, **changes: object
) -> ParamSpec:
    """The spec of a hidden matrix."""
    spec = ParamSpec(
        fqn=fqn,
        role="hidden",
        global_shape=shape,
        fan_in=shape[-1],
        fan_out=shape[0],
        init="normal",
        init_std=0.02,
        lr_mult=1.0,
        decay="lr_times_lambda" if len(shape) == 2 else None,
        in_fp8_plan=in_fp8_plan,
    )
    return ParamSpec(**{**vars(spec), **changes})  # type: ignore[arg-type]


def heavy_tailed_gradients(shape: tuple[int, int], steps: int, seed: int) -> Iterator[Tensor]:
    """Gradients of ``steps`` steps, FP32: magnitudes lognormal (sigma 1.5, a factor 4.5) within a row, rows
    up to a factor 100 apart, a persistent part and noise three times as large, entries of 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    rows = 10 ** (torch.rand(shape[0], 1, generator=generator) * 2 - 1)
    magnitude = 1e-4 * rows * torch.exp(1.5 * torch.randn(shape, generator=generator))
    direction = torch.randn(shape, generator=generator).sign()
    for _ in range(steps):
        yield magnitude * (0.33 * direction + torch.randn(shape, generator=generator))


@dataclass
class ReferenceAdamW:
    """The formula in FP64, on whole tensors."""

    w: Tensor
    settings: AdamWSettings = SETTINGS
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    t: int = 0

    def __post_init__(self) -> None:
        self.w = self.w.double()
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)

    def step(self, gradient: Tensor) -> None:
        """One update; decay by lr · lambda."""
        s, g = self.settings, gradient.double()
        self.t += 1
        self.m = s.beta1 * self.m + (1 - s.beta1) * g
        self.v = s.beta2 * self.v + (1 - s.beta2) * g * g
        m_hat, v_hat = self.m / (1 - s.beta1**self.t), self.v / (1 - s.beta2**self.t)
        self.w = self.w - s.lr * s.weight_decay * self.w - s.lr * m_hat / (v_hat.sqrt() + s.eps)


def run_step(optimizer: Optimizer, gradients: Mapping[str, Tensor], step: int, **options: bool) -> None:
    """Step ``step`` (1-based) at the peak rate without clipping."""
    optimizer.step(
        lambda fqn: TensorGradient(gradients[fqn]),
        step=step,
        lr_factor=1.0,
        grad_multiplier=torch.tensor(1.0),
        **options,
    )


def single(
    rule: type[Rule],
    plan: StateFormats,
    value: Tensor,
    *,
    settings: RuleSettings = SETTINGS,
    **options: Any,
) -> tuple[Optimizer, nn.Parameter]:
    """An optimizer of one BF16 matrix ``w`` of the FP8 plan that starts at ``value``, and the matrix."""
    parameter = nn.Parameter(value.to(torch.bfloat16))
    spec = matrix_spec("w", tuple(value.shape))
    optimizer = Optimizer(rule(settings), {"w": parameter}, {"w": spec}, plan, **{"seed": 1, **options})
    optimizer.states.seed_master("w", value)
    optimizer.publish()
    return optimizer, parameter
