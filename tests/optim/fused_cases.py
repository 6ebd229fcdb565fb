"""What the tests of the fused pass share: parameters of many shapes, gradients in each form, and optimizers
that update them by the kernel, by its reference, or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.kernels.optimizer_update import optimizer_update
from fp8train.models.param_spec import ParamSpec, Shard
from fp8train.numerics.block_scales import as_blocks, quantize_blocks
from fp8train.optim.gradient import GradientReader, TensorGradient
from fp8train.optim.optimizer import Optimizer
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.held import HeldBlocks
from fp8train.parallel.gradients.receivers import Everyone, Member
from fp8train.precision.number_formats import E4M3, Format
from fp8train.precision.scale_blocks import block_size
from fp8train.precision.state_formats import StateFormats
from fp8train.update_rules.adamw import AdamW
from fp8train.update_rules.lion import Lion
from fp8train.update_rules.rule import Rule, RuleSettings
from tests.optim.state_cases import SETTINGS, matrix_spec

LION = RuleSettings(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.3)
RULES: dict[str, Rule] = {"adamw": AdamW(SETTINGS), "lion": Lion(LION)}


def plan_of(rule: str, plan: StateFormats) -> StateFormats:
    """The plan, without a second moment for Lion."""
    return plan if rule == "adamw" else StateFormats(plan.master, plan.exp_avg, None)


class Blocks:
    """A gradient in FP8 blocks, as a bucket hands it over."""

    def __init__(self, gradient: Tensor, block: int | None = None, fmt: Format = E4M3) -> None:
        block = block or block_size(gradient.shape[-1])
        payload, scales = quantize_blocks(as_blocks(gradient, block), fmt)
        shape = tuple(gradient.shape)
        places = Everyone().places([Member("w", shape)], [-(-shape[-1] // block)])
        self._held = HeldBlocks(payload, scales, places)

    def reader(self) -> GradientReader:
        """Of all its elements."""
        bucket = Bucket.__new__(Bucket)
        bucket._held = self._held
        return bucket.reader(0)


def in_blocks(gradient: Tensor) -> GradientReader:
    """E4M3 codes with a scale per block."""
    return Blocks(gradient).reader()


def in_bf16(gradient: Tensor) -> GradientReader:
    """BF16 values."""
    return TensorGradient(gradient.bfloat16())


def in_fp32(gradient: Tensor) -> GradientReader:
    """FP32 values."""
    return TensorGradient(gradient)


def model_of(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, shard: Shard | None = None
) -> tuple[dict[str, ParamSpec], dict[str, Tensor]]:
    """Specs of parameters, and initial values; matrices are in the FP8 plan, with rates of their own."""
    specs, values = {}, {}
    for number, (fqn, shape) in enumerate(shapes.items()):
        matrix = len(shape) == 2
        spec = matrix_spec(
            fqn, shape, in_fp8_plan=matrix, role="hidden" if matrix else "norm", lr_mult=1.0 + number / 4
        )
        specs[fqn] = replace(spec, shard=shard) if matrix else spec
        generator = torch.Generator().manual_seed(number)
        values[fqn] = 0.02 * torch.randn(shape, generator=generator)
    del dtype
    return specs, values


def optimizer_of(
    specs: Mapping[str, ParamSpec],
    values: Mapping[str, Tensor],
    plan: StateFormats,
    *,
    rule: str = "adamw",
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> tuple[Optimizer, dict[str, nn.Parameter]]:
    """An optimizer and its parameters, all at their initial values."""
    parameters = {
        fqn: nn.Parameter(spec.local(values[fqn]).to(dtype).contiguous()) for fqn, spec in specs.items()
    }
    optimizer = Optimizer(RULES[rule], parameters, specs, plan_of(rule, plan), seed=1, **options)
    for fqn, value in values.items():
        optimizer.states.seed_master(fqn, value)
    optimizer.publish()
    return optimizer, parameters


BY: dict[str, Callable[..., tuple[Tensor, Tensor]] | None] = {
    "kernel": optimizer_update.launch,
    "reference": optimizer_update,
    "chunks": None,
}
