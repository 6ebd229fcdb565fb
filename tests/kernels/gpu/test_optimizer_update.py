"""The launcher of the optimizer step against its reference, to the bit, through the optimizer that makes its
tables; and the reference against the formulas in FP64. Against the pass in chunks: tests/optim."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fp8train.kernels.optimizer_update import NUMBERS, PLACES, Signature, float_bits, optimizer_update
from fp8train.models.param_spec import Shard
from fp8train.precision.state_formats import StateFormat as F
from fp8train.precision.state_formats import StateFormats
from tests.kernels.gpu.same import same
from tests.optim.fused_cases import LION, Form, Run, gradient_of, in_bf16, in_blocks, in_e5m2, in_fp32
from tests.optim.state_cases import O1, O2, SETTINGS, ReferenceAdamW

SR = "stochastic"
EVERY_DRAW = StateFormats(F("bf16", rounding=SR), F("e4m3", rounding=SR), F("e4m3", sqrt=True, rounding=SR))
REMAINDER = StateFormats(F("bf16_remainder"), F("e5m2"), F("e5m2", rounding=SR))
SIXTEEN = StateFormats(F("fp16_scaled"), F("bf16"), F("bf16", sqrt=True))
BF16 = StateFormats(F("bf16", rounding=SR), F("bf16"), F("bf16"))


class Case(NamedTuple):
    plan: StateFormats
    shapes: dict[str, tuple[int, ...]]
    form: Form = in_blocks
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "O2": Case(O2, {"a": (5, 256), "b": (3, 128), "norm": (70,)}),
    "O1": Case(O1, {"a": (5, 256), "norm": (128,)}, in_bf16),
    "lion": Case(O2, {"a": (5, 256), "norm": (70,)}, options={"rule": "lion"}),
    "every state drawn": Case(EVERY_DRAW, {"a": (3, 128)}, in_e5m2),
    "remainder in the parameter": Case(REMAINDER, {"a": (3, 128)}),
    "remainder beside it": Case(REMAINDER, {"a": (3, 128)}, in_fp32, {"dtype": torch.float32}),
    "16 bits": Case(SIXTEEN, {"a": (3, 128)}, in_fp32),
    "FP32 in the parameter": Case(StateFormats(), {"a": (4, 64)}, options={"dtype": torch.float32}),
    "short blocks": Case(O2, {"a": (3, 257), "b": (2, 131)}),
    "blocks of 96": Case(O2, {"a": (4, 192)}),
    "blocks of 5": Case(O2, {"a": (9, 5)}),
    "part of rows": Case(EVERY_DRAW, {"a": (4, 320)}, options={"shard": Shard(1, 1, 2)}),
    "part of the rows": Case(O2, {"a": (6, 160)}, options={"shard": Shard(0, 1, 2)}),
    "part of rows without blocks": Case(BF16, {"a": (6, 74)}, in_bf16, {"shard": Shard(1, 1, 2)}),
}


def compare(kernel: Run, reference: Run) -> None:
    theirs = reference.memory()
    for name, ours in kernel.memory().items():
        assert same(ours, theirs[name]), name
    expected = reference.optimizer.weight_amax()
    for fqn, partials in kernel.optimizer.weight_amax().items():
        assert same(partials.amax(), expected[fqn].amax()), fqn
        assert not (partials < 0).any()
    counts = reference.optimizer.statistics()
    for name, share in kernel.optimizer.statistics().items():
        assert same(share, counts[name]), name


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_has_the_bits_of_the_reference(name: str) -> None:
    plan, shapes, form, options = CASES[name]
    kernel = Run(shapes, plan, update=optimizer_update.launch, **options)
    reference = Run(shapes, plan, update=optimizer_update, **options)
    compare(kernel, reference)
    for step in (1, 2):
        for run in (kernel, reference):
            run.step(step, form, count_flushed=step == 2)
            assert run.optimizer.describe_pass().startswith(f"optimizer step: {len(shapes)} parameters fused")
            assert "chunks" not in run.optimizer.describe_pass()
        compare(kernel, reference)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_what_is_not_finite(rule: str, value: float) -> None:
    """The optimizer is promised finite gradients; the kernel still does what its reference does."""

    def poisoned(gradient: Tensor) -> Any:
        gradient[1, 5] = value
        return in_fp32(gradient)

    runs = [
        Run({"a": (3, 128)}, plan, rule=rule, update=update)
        for plan in (O2, StateFormats())
        for update in (optimizer_update.launch, optimizer_update)
    ]
    for run in runs:
        run.step(1, poisoned)
    for kernel, reference in (runs[:2], runs[2:]):
        compare(kernel, reference)
        if rule == "adamw":  # Lion takes a sign
            assert not reference.optimizer.states.master("a").isfinite().all()


def test_a_program_walks_over_many_tiles() -> None:
    """One program per parameter instead of one per tile; what it leaves is the same."""

    def few(*args: Any) -> tuple[Tensor, Tensor]:
        places = args[10].clone()
        places[:, PLACES.index("programs")] = 1
        places[:, PLACES.index("first_program")] = torch.arange(len(places))
        program_of = torch.arange(len(places), dtype=torch.int32)
        return optimizer_update.launch(*args[:10], places, args[11], program_of, args[13], 3)

    shapes: dict[str, tuple[int, ...]] = {"a": (18, 128), "b": (8, 257)}
    kernel, reference = Run(shapes, O2, update=few), Run(shapes, O2, update=optimizer_update)
    for run in (kernel, reference):
        run.step(1, in_blocks, count_flushed=True)
    compare(kernel, reference)
    assert kernel.optimizer.weight_amax()["a"].shape == (3,)


def test_the_reference_is_adamw() -> None:
    run = Run({"a": (8, 64)}, StateFormats(), dtype=torch.float32, update=optimizer_update)
    truth = ReferenceAdamW(run.weights["a"].detach().clone())
    truth.settings = type(SETTINGS)(**{**vars(SETTINGS), "lr": SETTINGS.lr / 2})
    start = truth.w.clone()
    for step in range(1, 6):
        run.step(step)
        truth.step(0.7 * gradient_of((8, 64), step))
    moved = (truth.w - start).norm()
    assert moved > 1e-3 and (run.weights["a"] - truth.w).norm() < 1e-4 * moved
    for role, expected in (("exp_avg", truth.m), ("exp_avg_sq", truth.v)):
        ours = run.optimizer.states.decoded("a", role)
        assert (ours - expected).norm() < 1e-6 * expected.norm()


def test_the_reference_is_lion() -> None:
    run = Run({"a": (8, 64)}, StateFormats(), dtype=torch.float32, rule="lion", update=optimizer_update)
    w = run.weights["a"].detach().double()
    m, start = torch.zeros_like(w), w.clone()
    for step in range(1, 6):
        run.step(step)
        g = 0.7 * gradient_of((8, 64), step).double()
        lr = LION.lr / 2
        w = w - lr * LION.weight_decay * w - lr * torch.sign(LION.beta1 * m + (1 - LION.beta1) * g)
        m = LION.beta2 * m + (1 - LION.beta2) * g
    assert (run.weights["a"] - w).norm() < 1e-4 * (w - start).norm()
    assert (run.optimizer.states.decoded("a", "exp_avg") - m).norm() < 1e-6 * m.norm()


def test_numbers_travel_as_their_bits() -> None:
    assert float_bits(1.0) == 0x3F800000 and float_bits(-0.0) == -(1 << 31)
    assert NUMBERS[:2] == ("gradient", "gradient_scale") and PLACES[6:8] == ("weight", "first_program")
    assert Signature._fields[0] == "rule"
