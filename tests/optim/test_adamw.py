"""AdamW against torch's own, and the rules of master weights and decay."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from fp8train.models.param_spec import ParamSpec
from fp8train.optim.clipping import clip_multiplier
from fp8train.optim.gradient import TensorGradient
from fp8train.optim.optimizer import CHUNK, Optimizer
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamW, AdamWSettings

SETTINGS = AdamWSettings(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def spec(fqn: str, shape: tuple[int, ...], **changes) -> ParamSpec:
    values = dict(
        fqn=fqn,
        role="hidden",
        global_shape=shape,
        fan_in=1,
        fan_out=1,
        init="normal",
        init_std=1.0,
        lr_mult=1.0,
        decay="lr_times_lambda" if len(shape) == 2 else None,
    )
    return ParamSpec(**{**values, **changes})


def adamw(parameters: dict[str, nn.Parameter], specs: dict[str, ParamSpec]) -> Optimizer:
    return Optimizer(AdamW(SETTINGS), parameters, specs, StateFormats(), seed=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = {
        "w": nn.Parameter(torch.randn(33, 17, dtype=dtype)),
        "b": nn.Parameter(torch.randn(17, dtype=dtype)),
    }
    theirs = {k: nn.Parameter(p.detach().double()) for k, p in ours.items()}
    optimizer = adamw(ours, {k: spec(k, tuple(p.shape)) for k, p in ours.items()})
    groups = [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 51):
        grads = {k: torch.randn(p.shape, dtype=dtype) * 10.0 ** -(step % 5) for k, p in ours.items()}
        factor = 1 / step**0.5
        for group in reference.param_groups:
            group["lr"] = 0.01 * factor
        for k, p in theirs.items():
            p.grad = grads[k].double() * 0.5
        reference.step()
        optimizer.step(
            lambda k: TensorGradient(grads[k]),  # noqa: B023
            step=step,
            lr_factor=factor,
            grad_multiplier=torch.tensor(0.5),
        )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for k, p in ours.items():
        torch.testing.assert_close(p.double(), theirs[k], rtol=tolerance, atol=tolerance)


def test_bf16_parameters_follow_an_fp32_master() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    optimizer = adamw({"w": parameter}, {"w": spec("w", (4, 4), decay=None)})
    true = torch.full((4, 4), 1.001)
    optimizer.states.seed_master("w", true)
    assert torch.equal(optimizer.states.master("w"), true)  # not the BF16 rounding of it
    tiny = AdamWSettings(lr=1e-5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    optimizer.rule.settings = tiny
    for step in range(1, 301):  # each step is far below a BF16 ulp of 1 (2^-7); the master must not lose it
        optimizer.step(
            lambda _: TensorGradient(torch.ones(4, 4)),
            step=step,
            lr_factor=1.0,
            grad_multiplier=torch.tensor(1.0),
        )
    torch.testing.assert_close(optimizer.states.master("w"), true - 300e-5, rtol=1e-5, atol=0)
    assert torch.equal(parameter, optimizer.states.master("w").to(torch.bfloat16))


def test_bits_do_not_depend_on_how_a_tensor_is_cut() -> None:
    torch.manual_seed(0)
    size = CHUNK + 4096 + 37
    whole, grads = torch.randn(size), torch.randn(size)
    cuts = [0, 64 * 100, CHUNK, size]
    parts = [nn.Parameter(whole[a:b].clone()) for a, b in itertools.pairwise(cuts)]
    one = nn.Parameter(whole.clone())
    first = adamw({"w": one}, {"w": spec("w", (size,), decay="lr_times_lambda")})
    second = adamw(
        {str(i): p for i, p in enumerate(parts)},
        {str(i): spec(str(i), tuple(p.shape), decay="lr_times_lambda") for i, p in enumerate(parts)},
    )
    for step in (1, 2, 3):
        first.step(
            lambda _: TensorGradient(grads), step=step, lr_factor=1.0, grad_multiplier=torch.tensor(0.3)
        )
        second.step(
            lambda k: TensorGradient(grads[cuts[int(k)] : cuts[int(k) + 1]]),
            step=step,
            lr_factor=1.0,
            grad_multiplier=torch.tensor(0.3),
        )
    assert torch.equal(one, torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("lr_times_lambda", 1 - 0.01 * 0.5 * 2 * 0.1),
        ("independent", 1 - 0.5 * 0.1),
        ("fully_decoupled", 1 - 0.1),
        (None, 1.0),
    ],
)
def test_decay_rules(rule, expected: float) -> None:
    parameter = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = adamw({"w": parameter}, {"w": spec("w", (2, 2), decay=rule, lr_mult=2.0)})
    optimizer.step(
        lambda _: TensorGradient(torch.zeros(2, 2)),
        step=1,
        lr_factor=0.5,
        grad_multiplier=torch.tensor(1.0),
    )
    assert parameter.flatten().tolist() == pytest.approx([expected] * 4, rel=1e-12)


def test_clip_multiplier() -> None:
    assert float(clip_multiplier(torch.tensor(4.0), 1.0)) == 0.25
    assert float(clip_multiplier(torch.tensor(0.5), 1.0)) == 1.0
    assert float(clip_multiplier(torch.tensor(0.0), 1.0)) == 1.0
    assert float(clip_multiplier(torch.tensor(4.0), 0.0)) == 1.0
    assert clip_multiplier(torch.tensor(torch.nan), 1.0).isnan()


def moved_beside_an_outlier(plan: StateFormats, neighbour: float, settings: AdamWSettings) -> list[float]:
    """Steps in learning rates of a weight that sees one gradient, in the block of a gradient of 1."""
    described = {"a": spec("a", (1, 128), in_fp8_plan=True, decay=None)}
    parameters = {"a": nn.Parameter(torch.zeros(1, 128))}
    optimizer = Optimizer(AdamW(settings), parameters, described, plan, seed=0)
    gradient, steps = torch.zeros(1, 128), []
    for step, value in enumerate((neighbour, 0.0, 0.0), start=1):
        gradient[0, :2] = torch.tensor([1.0, value])
        before = optimizer.states.master("a").clone()
        multiplier = torch.tensor(1.0)
        reader = TensorGradient(gradient)
        optimizer.step(lambda _, r=reader: r, step=step, lr_factor=1.0, grad_multiplier=multiplier)
        steps.append(abs(float((optimizer.states.master("a") - before)[0, 1])) / settings.lr)
    return steps


@pytest.mark.parametrize("exp_avg_sq", ["e5m2", "e4m3", "fp16_scaled"])
@pytest.mark.parametrize("neighbour", [1e-3, 1e-4, 1e-5, 1e-6])
def test_a_second_moment_that_rounded_to_zero_makes_no_long_step(exp_avg_sq: str, neighbour: float) -> None:
    """Beside an outlier in its block, a small v is lost before the m that belongs to it."""
    rounded = StateFormats(exp_avg=StateFormat("e4m3"), exp_avg_sq=StateFormat(exp_avg_sq))
    assert max(moved_beside_an_outlier(StateFormats(), neighbour, SETTINGS)) <= 1.01
    assert max(moved_beside_an_outlier(rounded, neighbour, SETTINGS)) <= 1.25


@pytest.mark.parametrize(("exp_avg_sq", "neighbour"), [("e4m3", 1e-3), ("e5m2", 1e-5)])
def test_without_the_bound_it_does(exp_avg_sq: str, neighbour: float) -> None:
    """As FP8-LM has it: v was stored as 0 beside an m that was not, and eps alone divides."""
    free = replace(SETTINGS, bounded_update=False)
    rounded = StateFormats(exp_avg=StateFormat("e4m3"), exp_avg_sq=StateFormat(exp_avg_sq))
    # At step 2, m = 0.9 · 0.1 · g over 1 - 0.9^2.
    expected = 0.09 * neighbour / (1 - 0.9**2) / SETTINGS.eps
    moved = moved_beside_an_outlier(rounded, neighbour, free)
    assert moved[1] == pytest.approx(expected, rel=0.3)  # m has 4 bits here, or fewer
    exact = [moved_beside_an_outlier(StateFormats(), neighbour, settings) for settings in (free, SETTINGS)]
    assert exact[0] == exact[1]


def test_the_bound_of_exact_moments_holds_and_is_reached() -> None:
    """Gradients that grow by β2/β1 a step are the worst history there is."""
    rule = AdamW(SETTINGS)
    m = v = 0.0
    for step in range(1, 401):
        gradient = (SETTINGS.beta2 / SETTINGS.beta1) ** step
        m = SETTINGS.beta1 * m + (1 - SETTINGS.beta1) * gradient
        v = SETTINGS.beta2 * v + (1 - SETTINGS.beta2) * gradient**2
        bound = rule._largest_ratio(step)
        assert bound is not None
        assert m == pytest.approx(bound * v**0.5, rel=1e-9)
