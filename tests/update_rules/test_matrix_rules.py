"""The path of a rule that needs whole matrices, with one that orthogonalises a momentum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp8train.models.param_spec import Shard
from fp8train.optim.checkpoint_states import plan_load
from fp8train.optim.gradient import TensorGradient
from fp8train.optim.optimizer import Optimizer
from fp8train.optim.parameter_state import Region
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamW, AdamWSettings
from fp8train.update_rules.rule import Load, MatrixRule, NewValues, RuleSettings, StepScalars
from tests.optim.state_cases import FP16_MASTER, heavy_tailed_gradients, matrix_spec, run_step

VALUES = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "eps": 1e-8,
    "bounded_update": True,
}


class Orthogonal(MatrixRule):
    """w <- w - η·λ·w - η·U·Vᵀ of the momentum's U·S·Vᵀ; AdamW for what is no matrix."""

    name = "orthogonal"
    summary = "For the test."
    has_second_moment = False
    others_type = AdamW

    def new_values(self, scalars: StepScalars, gradient: Tensor, load: Load) -> NewValues:
        """Yield momentum and master weight."""
        assert gradient.dim() == 2
        m = load("exp_avg").lerp_(gradient, 1 - self.settings.beta1)
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        yield "exp_avg", m
        yield "master", load("master").mul_(1 - scalars.decay).sub_(u @ vh, alpha=scalars.lr)


def rule() -> Orthogonal:
    made = Orthogonal.of(VALUES)
    assert isinstance(made, Orthogonal)
    return made


def formula(value: Tensor, gradients: list[Tensor]) -> Tensor:
    """The rule in FP64, by the polar factor m (mᵀm)^(-1/2) instead of a decomposition of m."""
    w, m = value.double(), torch.zeros_like(value, dtype=torch.float64)
    for gradient in gradients:
        m = 0.9 * m + 0.1 * gradient.double()
        square, basis = torch.linalg.eigh(m.T @ m)
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m @ (basis * square.rsqrt()) @ basis.T)
    return w


def optimizer_of(
    plan: StateFormats, value: Tensor, *, chunk: int
) -> tuple[Optimizer, dict[str, nn.Parameter]]:
    """Of a hidden matrix in the FP8 plan, a head and a norm."""
    shape = tuple(value.shape)
    specs = {
        "w": matrix_spec("w", shape, role="residual_out"),
        "head": matrix_spec("head", shape, role="head", in_fp8_plan=False),
        "norm": matrix_spec("norm", shape[1:], role="norm", in_fp8_plan=False),
    }
    parameters = {fqn: nn.Parameter(torch.zeros(spec.global_shape)) for fqn, spec in specs.items()}
    optimizer = Optimizer(rule(), parameters, specs, plan, seed=1, chunk=chunk)
    for fqn in ("w", "head"):
        optimizer.states.seed_master(fqn, value)
    optimizer.publish()
    return optimizer, parameters


SHAPE = (96, 64)
GRADIENTS = list(heavy_tailed_gradients(SHAPE, 3, seed=5))
START = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def test_a_matrix_is_updated_as_a_whole_and_the_rest_by_the_element_rule() -> None:
    """Chunks of 64 elements: the rule must not see them."""
    optimizer, parameters = optimizer_of(StateFormats(exp_avg_sq=None), START, chunk=64)
    head = nn.Parameter(START.double())
    theirs = torch.optim.AdamW([head], 0.01, (0.9, 0.95), 1e-8, weight_decay=0.1)
    for step, gradient in enumerate(GRADIENTS, 1):
        run_step(optimizer, {"w": gradient, "head": gradient, "norm": gradient[0].clone()}, step)
        head.grad = gradient.double()
        theirs.step()
    moved = (formula(START, GRADIENTS) - START.double()).norm()
    assert float((parameters["w"].detach().double() - formula(START, GRADIENTS)).norm()) < 1e-5 * float(moved)
    torch.testing.assert_close(parameters["head"].double(), head, rtol=1e-5, atol=1e-7)
    kept = {fqn: tuple(state.storages) for fqn, state in optimizer.states.items()}
    assert kept == {
        "w": ("master", "exp_avg"),
        "head": ("master", "exp_avg", "exp_avg_sq"),
        "norm": ("master", "exp_avg", "exp_avg_sq"),
    }
    numel = 96 * 64
    expected = {"master": 2 * numel + 64, "exp_avg": 2 * numel + 64, "exp_avg_sq": numel + 64}
    stored = optimizer.states.stored_bytes(in_plan_only=False)
    assert stored == {role: 4 * count for role, count in expected.items()}


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_its_states_have_any_format(granularity: str) -> None:
    """An FP8 momentum, in one pass and in two; the errors are those of its rounding."""
    plan = StateFormats(FP16_MASTER, StateFormat("e4m3", granularity=granularity), None)  # type: ignore[arg-type]
    optimizer, parameters = optimizer_of(plan, START, chunk=1 << 10)
    for step, gradient in enumerate(GRADIENTS, 1):
        run_step(optimizer, {"w": gradient, "head": gradient, "norm": gradient[0].clone()}, step)
    moved = (formula(START, GRADIENTS) - START.double()).norm()
    error = float((parameters["w"].detach().double() - formula(START, GRADIENTS)).norm() / moved)
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("cut", ["rows of ZeRO", "tensor-parallel columns"])
def test_a_matrix_that_is_cut_is_refused(cut: str) -> None:
    spec, regions = matrix_spec("w", (8, 256)), {}
    if cut == "rows of ZeRO":
        parameter, regions = torch.zeros(4, 256), {"w": Region((4, 256), (4, 0))}
        kept = r"\(4, 256\)"
    else:
        parameter, spec = torch.zeros(8, 128), replace(spec, shard=Shard(1, 0, 2))
        kept = r"\(8, 128\)"
    message = rf"w: orthogonal updates whole matrices, but this rank keeps {kept} of \(8, 256\)"
    with pytest.raises(ValueError, match=message):
        Optimizer(
            rule(), {"w": parameter}, {"w": spec}, StateFormats(exp_avg_sq=None), seed=0, regions=regions
        )


def test_it_declares_what_it_and_its_element_rule_read() -> None:
    assert Orthogonal.reads("eps") and AdamW.reads("eps") and not Orthogonal.reads("momentum")
    made = rule()
    assert made.settings == RuleSettings(lr=0.01, beta1=0.9, beta2=0.95, weight_decay=0.1)
    assert made.others.settings == AdamWSettings(lr=0.01, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8)


def test_gradients_are_multiplied_by_the_clip_factor() -> None:
    """A polar factor does not notice; the momentum does."""
    optimizer, _ = optimizer_of(StateFormats(exp_avg_sq=None), START, chunk=64)
    gradients = {"w": GRADIENTS[0], "head": GRADIENTS[0], "norm": GRADIENTS[0][0].clone()}
    optimizer.step(
        lambda fqn: TensorGradient(gradients[fqn]),
        step=1,
        lr_factor=1.0,
        grad_multiplier=torch.tensor(0.5),
    )
    torch.testing.assert_close(optimizer.states.decoded("w", "exp_avg"), 0.05 * GRADIENTS[0])


def test_a_checkpoint_holds_the_states_that_each_parameter_has() -> None:
    states = optimizer_of(StateFormats(FP16_MASTER, StateFormat("e4m3"), None), START, chunk=64)[0].states
    described = {name: (shape, tensor.dtype) for name, (tensor, shape, _) in states.logical_tensors().items()}
    found = plan_load(states, described, roles=states.roles, roots={})
    assert (found.problems, found.recasts) == ([], [])
    assert sorted(found.equal) == sorted(states.tensors())
    assert "exp_avg_sq/head" in found.equal and not any(
        name.startswith("exp_avg_sq/w") for name in found.equal
    )
