"""What the tests of the fused pass share: parameters of many shapes, gradients in each form, and optimizers
that update them by the kernel, by its reference, or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.kernels.optimizer_update import optimizer_update
from fp8train.models.param_spec import Shard
from fp8train.numerics.block_scales import as_blocks, quantize_blocks
from fp8train.optim.gradient import GradientReader, TensorGradient
from fp8train.optim.optimizer import Optimizer
from fp8train.parallel.gradients.block_storage import row_blocks
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.held import HeldBlocks
from fp8train.parallel.gradients.receivers import Member, Places
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.scale_blocks import block_size
from fp8train.precision.state_formats import StateFormats
from fp8train.update_rules.adamw import AdamW
from fp8train.update_rules.lion import Lion
from fp8train.update_rules.rule import Rule, RuleSettings
from tests.optim.state_cases import SETTINGS, matrix_spec

LION = RuleSettings(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.3)
RULES: dict[str, Rule] = {"adamw": AdamW(SETTINGS), "lion": Lion(LION)}


Form = Callable[[Tensor], GradientReader]


class _Held(Bucket):
    """A bucket of one gradient that is reduced already."""

    def __init__(self, held: HeldBlocks) -> None:
        self._held = held


def in_blocks(gradient: Tensor, fmt: Format = E4M3, block: int | None = None) -> GradientReader:
    """FP8 codes with a scale per block of a row, as a bucket hands them over."""
    block = block or block_size(gradient.shape[-1])
    payload, scales = quantize_blocks(as_blocks(gradient, block), fmt)
    member = Member("w", tuple(gradient.shape))
    return _Held(HeldBlocks(payload, scales, Places([member], row_blocks([member], block)), scales)).reader(0)


def in_e5m2(gradient: Tensor) -> GradientReader:
    """E5M2 codes with a scale per block."""
    return in_blocks(gradient, E5M2)


def in_bf16(gradient: Tensor) -> GradientReader:
    """BF16 values."""
    return TensorGradient(gradient.bfloat16())


def in_fp32(gradient: Tensor) -> GradientReader:
    """FP32 values."""
    return TensorGradient(gradient)


class Run:
    """Parameters, and an optimizer that updates them in one way; matrices are in the FP8 plan, with rates of
    their own."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        plan: StateFormats,
        *,
        rule: str = "adamw",
        dtype: torch.dtype = torch.bfloat16,
        shard: Shard | None = None,
        **options: Any,
    ) -> None:
        """Start at values that shapes alone decide. ``shard``: the part of each matrix that is kept."""
        self.specs = {}
        for number, (fqn, shape) in enumerate(shapes.items()):
            matrix = len(shape) == 2
            spec = matrix_spec(fqn, shape, in_fp8_plan=matrix, lr_mult=1 + number / 4)
            self.specs[fqn] = replace(spec, shard=shard if matrix else None)
        generator = torch.Generator().manual_seed(0)
        values = {fqn: 0.02 * torch.randn(shape, generator=generator) for fqn, shape in shapes.items()}
        self.weights = {
            fqn: nn.Parameter(spec.local(values[fqn]).to(dtype).contiguous())
            for fqn, spec in self.specs.items()
        }
        if rule == "lion":
            plan = replace(plan, exp_avg_sq=None)
        self.optimizer = Optimizer(RULES[rule], self.weights, self.specs, plan, seed=1, **options)
        for fqn, value in values.items():
            self.optimizer.states.seed_master(fqn, value)
        self.optimizer.publish()

    def step(self, number: int, form: Form = in_fp32, **options: Any) -> None:
        """Step ``number`` (1-based) with gradients that it alone decides; vectors have them in FP32."""

        def grad(fqn: str) -> GradientReader:
            part = self.specs[fqn].local(gradient_of(self.specs[fqn].global_shape, number)).contiguous()
            return form(part) if part.dim() == 2 else in_fp32(part)

        clip = torch.tensor(0.7)
        self.optimizer.step(grad, step=number, lr_factor=0.5, grad_multiplier=clip, **options)

    def memory(self) -> dict[str, Tensor]:
        """All states, and the weights."""
        return {**self.optimizer.states.tensors(), **{fqn: w.detach() for fqn, w in self.weights.items()}}


def gradient_of(shape: tuple[int, ...], number: int) -> Tensor:
    """A gradient whose rows have magnitudes of their own, with zeros and one outlier."""
    generator = torch.Generator().manual_seed(1000 + number)
    gradient = 1e-3 * torch.randn(shape, generator=generator)
    gradient *= torch.exp2(torch.randint(-8, 8, (shape[0], *[1] * (len(shape) - 1)), generator=generator))
    gradient.view(-1)[::7] = 0.0
    gradient.view(-1)[3] = 2.0
    return gradient


BY: dict[str, Callable[..., tuple[Tensor, Tensor]] | None] = {
    "kernel": optimizer_update.launch,
    "reference": optimizer_update,
    "chunks": None,
}
