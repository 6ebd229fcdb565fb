"""The optimizer over flat vectors: against ours over parameters, FP64, and its own checkpoints."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8train.optim.flat_optimizer import FlatOptimizer
from fp8train.optim.gradient import TensorGradient
from fp8train.optim.make_storage import make_storage
from fp8train.optim.optimizer import Optimizer
from fp8train.optim.state_storage import StatePlace, Storage
from fp8train.precision.state_formats import StateFormat as F
from fp8train.precision.state_formats import StateFormats
from fp8train.update_rules.adamw import AdamW
from fp8train.update_rules.lion import Lion
from fp8train.update_rules.rule import Rule, RuleSettings
from tests.optim.state_cases import SETTINGS, heavy_tailed_gradients, matrix_spec
from tests.optim.test_optimizer import same_bytes

SR = "stochastic"
LION = RuleSettings(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1)
PLANS = {
    "fp32": StateFormats(),
    "O2": StateFormats(F(), F("e4m3"), F("fp16_scaled")),
    "roots, stochastic": StateFormats(F(), F("e4m3", rounding=SR), F("e4m3", sqrt=True, rounding=SR)),
    "expanded": StateFormats(F(), F("e4m3", expand=True), F("e5m2", expand=True)),
    "expanded roots": StateFormats(F(), F("e5m2"), F("e4m3", expand=True, sqrt=True, rounding=SR)),
    "bf16": StateFormats(F(), F("bf16", rounding=SR), F("bf16")),
    "blocks of 64": StateFormats(F(), F("e4m3", block=64), F("fp16_scaled", block=32)),
}
SHAPE = (24, 256)
CPU = torch.device("cpu")


def initial(numel: int, seed: int = 1) -> Tensor:
    return 0.02 * torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def flat(
    plan: StateFormats, values: Tensor, rule: Rule | None = None, **changes: object
) -> tuple[FlatOptimizer, Tensor]:
    parameter = values.clone().requires_grad_()
    group = {"params": [parameter], "formats": plan, "decay": "lr_times_lambda", "name": "w", **changes}
    return FlatOptimizer([group], rule or AdamW(SETTINGS), seed=3), parameter


def run(optimizer: FlatOptimizer, parameter: Tensor, gradients: list[Tensor], first: int = 0) -> None:
    for i, gradient in enumerate(gradients):
        optimizer.schedule((i + first + 1) / 8)
        parameter.grad = gradient.reshape(-1).clone()
        optimizer.step()


def gradients(steps: int, shape: tuple[int, int] = SHAPE, seed: int = 8) -> list[Tensor]:
    return list(heavy_tailed_gradients(shape, steps, seed=seed))


@pytest.mark.parametrize("name", [*PLANS, "lion"])
def test_equals_the_optimizer_over_parameters(name: str) -> None:
    """To the bit: weights and moments, where blocks begin at the same elements."""
    rule: Rule = Lion(LION) if name == "lion" else AdamW(SETTINGS)
    plan = StateFormats(F(), F("e4m3", rounding=SR), None) if name == "lion" else PLANS[name]
    weight = initial(SHAPE[0] * SHAPE[1]).view(SHAPE)
    spec = matrix_spec("w", SHAPE, lr_mult=0.5)
    ours = Optimizer(rule, {"w": weight.clone()}, {"w": spec}, plan, seed=3)
    ours.states.seed_master("w", weight)
    optimizer, parameter = flat(plan, weight.view(-1), rule, lr_mult=0.5)
    for step, gradient in enumerate(gradients(6)):
        ours.step(
            lambda fqn, gradient=gradient: TensorGradient(gradient),
            step=step + 1,
            lr_factor=(step + 1) / 8,
            grad_multiplier=torch.tensor(1.0),
        )
        run(optimizer, parameter, [gradient], step)
    assert same_bytes(parameter.detach(), ours.states.master("w"))
    assert not torch.equal(parameter.detach(), weight.view(-1))
    for role in ("exp_avg", "exp_avg_sq")[: 1 + rule.has_second_moment]:
        values = optimizer.moment(parameter, role, 0, parameter.numel())
        assert same_bytes(values, ours.states.decoded("w", role)) and values.abs().max() > 0
    stored = ours.states.stored_bytes(in_plan_only=True)
    assert optimizer.moments_bytes() == sum(stored.values()) - stored["master"]


@pytest.mark.parametrize("name", PLANS)
def test_near_torch_in_float64(name: str) -> None:
    """The mean step of rounded moments is that of exact ones up to the formats' errors."""
    values = initial(1000)
    optimizer, parameter = flat(PLANS[name], values)
    exact = values.double().requires_grad_()
    s = SETTINGS
    reference = torch.optim.AdamW(
        [exact], lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=s.weight_decay
    )
    for gradient in gradients(20, (10, 100)):
        parameter.grad, exact.grad = gradient.reshape(-1).clone(), gradient.reshape(-1).double()
        optimizer.step()
        reference.step()
    moved = exact.detach() - values.double()
    error = (parameter.detach().double() - exact.detach()).norm() / moved.norm()
    assert error < {"fp32": 1e-4, "O2": 0.06, "bf16": 0.02, "blocks of 64": 0.06}.get(name, 0.15)
    if name != "fp32":
        assert error > 1e-5


@pytest.mark.parametrize("name", PLANS)
def test_neither_chunks_nor_ranks_matter(name: str) -> None:
    """A range of a vector, with its place in it, is updated as in the whole; so are pieces of a range."""
    values, steps = initial(1900), gradients(4, (19, 100))
    whole, w = flat(PLANS[name], values)
    run(whole, w, steps)
    pieces, p = flat(PLANS[name], values)
    pieces._chunk = 256
    run(pieces, p, steps)
    assert same_bytes(p.detach(), w.detach())
    for start, stop in ((0, 640), (640, 1900)):
        part, q = flat(PLANS[name], values[start:stop])
        part.place(q, PLANS[name], name="w", offset=start)
        run(part, q, [g.reshape(-1)[start:stop] for g in steps])
        assert same_bytes(q.detach(), w.detach()[start:stop])


def test_groups_are_stepped_one_by_one_and_count_for_themselves() -> None:
    """As DeepSpeed does: it leaves one group, or one part of a group, at a time."""
    first, second = initial(256).requires_grad_(), initial(128, 2).requires_grad_()
    groups = [{"params": [first], "decay": "independent", "lr_mult": 2.0}, {"params": [second]}]
    optimizer = FlatOptimizer(groups, AdamW(SETTINGS), seed=0)
    all_groups = optimizer.param_groups
    expected = [copy.deepcopy(p.detach()).double() for p in (first, second)]
    for p in (first, second):
        p.grad = torch.full_like(p, 1e-3)
    for group in all_groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = all_groups
    assert [optimizer.step_of(p) for p in (first, second)] == [1, 1]
    s = SETTINGS
    expected[0] *= 1 - s.weight_decay
    for p, e, mult in ((first, expected[0], 2.0), (second, expected[1], 1.0)):
        torch.testing.assert_close(p.detach().double(), e - s.lr * mult, rtol=1e-6, atol=1e-8)
    for group in all_groups:  # a schedule that knows nothing of ours
        group["lr"] = s.lr / 2
    before = first.detach().double().clone()
    optimizer.step()
    decayed = before * (1 - s.weight_decay / 2)
    torch.testing.assert_close(first.detach().double(), decayed - s.lr, rtol=1e-6, atol=1e-7)


FORMATS = [
    F("e4m3"),
    F("e5m2"),
    F("fp16_scaled"),
    F("e4m3", block=32, rounding=SR),
    F("e4m3", sqrt=True),
    F("fp16_scaled", sqrt=True),
    F("e4m3", expand=True),
    F("e5m2", expand=True, rounding=SR),
    F("e4m3", expand=True, sqrt=True),
    F("bf16", rounding=SR),
    F(),
]


def storage_of(fmt: F, numel: int) -> Storage:
    block = fmt.block if fmt.in_blocks else 1
    return make_storage(fmt, StatePlace((numel,), block, 0, CPU), wide=torch.float32)


def assert_found_again(fmt: F, storage: Storage, numel: int) -> None:
    values = storage.load(0, numel).clone()
    again = storage_of(fmt, numel)
    again.restore(0, numel, values.clone())
    assert same_bytes(again.load(0, numel), values), str(fmt)


@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-58, 60),
    spread=st.floats(0.1, 40.0),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    fmt=st.sampled_from(FORMATS),
)
@settings(max_examples=300)
def test_decoded_moments_are_stored_as_they_were(
    seed: int, exponent: int, spread: float, zeros: float, fmt: F
) -> None:
    """Whatever was stored, stochastically or not: the values that a checkpoint holds come back."""
    generator = torch.Generator().manual_seed(seed)
    numel = 512
    size = torch.exp2(exponent + spread * (torch.rand(numel, generator=generator) - 0.5))
    values = size * torch.randn(numel, generator=generator).sign()
    values[torch.rand(numel, generator=generator) < zeros] = 0
    storage = storage_of(fmt, numel)
    key = 17 if fmt.rounding == SR else None
    storage.store(0, numel, values.abs() if fmt.sqrt else values, key)
    assert_found_again(fmt, storage, numel)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.is_scaled and not fmt.expand], ids=str)
def test_all_codes_at_all_scales_are_found_again(fmt: F) -> None:
    """Blocks of every finite code, beside every largest code, at scales from 2^-60 to 2^45: the square of a
    root must be a number of FP32."""
    storage = storage_of(fmt, 1 << 16)
    inner = storage.tensors()
    payload, scale = inner[".payload"], inner[".scale"]
    codes = torch.arange(1 << (8 * payload.element_size()), dtype=torch.int32)
    codes = codes.to({1: torch.uint8, 2: torch.uint16}[payload.element_size()]).view(payload.dtype)
    limit = 57344.0 if payload.dtype == torch.float16 else torch.finfo(payload.dtype).max
    legal = codes[codes.float().isfinite() & (codes.float().abs() <= limit)]
    legal = legal[legal.float() >= 0] if fmt.sqrt else legal
    block, blocks = storage.place.block, len(scale)
    generator = torch.Generator().manual_seed(1)
    for exponent in range(-60, 46, 1 if payload.element_size() == 1 else 15):
        drawn = legal[torch.randint(len(legal), (blocks, block), generator=generator)]
        largest = legal[torch.randint(len(legal), (blocks,), generator=generator)].float().abs()
        drawn = torch.where(drawn.float().abs() <= largest[:, None], drawn.float(), torch.zeros(()))
        drawn[:, 0] = largest
        payload.copy_(drawn.view(-1).to(payload.dtype))
        scale.fill_(127 + exponent)
        assert_found_again(fmt, storage, payload.numel())


@pytest.mark.parametrize("name", PLANS)
def test_moments_are_handed_over_in_ranges_that_cut_blocks(name: str) -> None:
    """In any order, over the moments of another run: what comes out of both optimizers is the same."""
    values = initial(1900)
    source, p = flat(PLANS[name], values)
    run(source, p, gradients(3, (19, 100)))
    target, q = flat(PLANS[name], p.detach())
    run(target, q, [1e6 * g for g in gradients(1, (19, 100), seed=4)])
    with torch.no_grad():
        q.copy_(p)
    cuts = [0, 5, 64, 130, 500, 512, 1000, 1003, 1024, 1800, 1900]
    for role in ("exp_avg", "exp_avg_sq"):
        pieces = [(a, source.moment(p, role, a, b)) for a, b in pairwise(cuts)]
        for start, piece in reversed(pieces):
            target.set_moment(q, role, start, piece)
    target.finish_moments()
    target.set_step(q, source.step_of(p))
    for role in ("exp_avg", "exp_avg_sq"):
        assert same_bytes(target.moment(q, role, 0, 1900), source.moment(p, role, 0, 1900))
    for optimizer, parameter in ((source, p), (target, q)):
        run(optimizer, parameter, gradients(2, (19, 100), seed=9), 3)
    assert same_bytes(q.detach(), p.detach())


@pytest.mark.parametrize("name", PLANS)
def test_continues_from_its_state_dict(name: str) -> None:
    values, steps = initial(1900), gradients(5, (19, 100))
    whole, p = flat(PLANS[name], values)
    run(whole, p, steps[:3])
    saved = copy.deepcopy(whole.state_dict())
    middle = p.detach().clone()
    run(whole, p, steps[3:], 3)
    resumed, q = flat(PLANS[name], middle)
    resumed.load_state_dict(saved)
    run(resumed, q, steps[3:], 3)
    assert same_bytes(q.detach(), p.detach())
    other, _ = flat(StateFormats(F(), F("e5m2"), F("e5m2")), values)
    with pytest.raises(
        ValueError, match=r"group 0 has moments in exp_avg e5m2.*, the saved state in exp_avg"
    ):
        other.load_state_dict(saved)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (StateFormats(F(), F("e4m3", granularity="tensor")), r"exp_avg in e4m3/tensor: .*granularity: block"),
        (StateFormats(F("bf16")), r"master weights in bf16: .* FP32 partitions"),
        (StateFormats(F(), F(), None), r"adamw keeps a second moment, but its format is None"),
        (StateFormats(F(), F("fp64")), r"exp_avg in fp64"),
    ],
)
def test_formats_that_a_flat_vector_cannot_have_are_refused(formats: StateFormats, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flat(formats, initial(8))
