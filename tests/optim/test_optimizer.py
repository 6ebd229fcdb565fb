"""What holds for every rule and format: who gets which format, what is stored, resume, publishing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from fp8train.models.param_spec import Shard
from fp8train.optim.optimizer import Optimizer
from fp8train.optim.parameter_state import Region
from fp8train.precision.state_formats import StateFormat as F
from fp8train.precision.state_formats import StateFormats
from fp8train.update_rules.adamw import AdamW, AdamWSettings
from fp8train.update_rules.lion import Lion
from fp8train.update_rules.rule import RuleSettings
from tests.optim.state_cases import (
    FP16_MASTER,
    O1,
    O2,
    PAPER,
    SETTINGS,
    heavy_tailed_gradients,
    matrix_spec,
    run_step,
    single,
)

LION = RuleSettings(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1)
SR = "stochastic"
O2_BYTES = StateFormats(FP16_MASTER, F("e4m3"), F("e4m3", sqrt=True, rounding=SR))
O2_EXPANDED = StateFormats(FP16_MASTER, F("e4m3"), F("e4m3", expand=True))
REMAINDER = StateFormats(F("bf16_remainder"), F("bf16", rounding=SR), F("e5m2", expand=True, rounding=SR))
PLANS = {
    "fp32": StateFormats(),
    "O1": O1,
    "O2": O2,
    "O2 8-bit v": O2_BYTES,
    "O2 expanded v": O2_EXPANDED,
    "remainder": REMAINDER,
    "paper": PAPER,
}


def gradients_for(shape: tuple[int, int], steps: int) -> list[Tensor]:
    return list(heavy_tailed_gradients(shape, steps, seed=8))


def initial(shape: tuple[int, int]) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("shape", [(64, 100), (7, 9), (1, 130)], ids=str)
def test_a_plain_plan_has_the_bits_of_torch(shape: tuple[int, int]) -> None:
    """Exact states: masters and moments of torch's own fused AdamW. It computes the last few elements of a
    call without vector instructions, so it gets a length that it has no tail of."""
    value, gradients = initial(shape), gradients_for(shape, 3)
    optimizer, parameter = single(AdamW, StateFormats(), value)
    short = -math.prod(shape) % 64
    w = nn.functional.pad(value.flatten(), (0, short)).requires_grad_()
    s = SETTINGS
    theirs = torch.optim.AdamW([w], s.lr, (s.beta1, s.beta2), s.eps, weight_decay=0.0, fused=True)
    for step, g in enumerate(gradients, 1):
        run_step(optimizer, {"w": g}, step)
        w.grad = nn.functional.pad(g.flatten(), (0, short))
        with torch.no_grad():
            w.mul_(1 - s.lr * s.weight_decay)
        theirs.step()
    found = {
        role: optimizer.states.decoded("w", role).flatten() for role in ("master", "exp_avg", "exp_avg_sq")
    }
    count = value.numel()
    assert torch.equal(found["master"], w.detach()[:count])
    for role in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[role], theirs.state[w][role][:count])
    assert torch.equal(parameter.flatten(), w.detach()[:count].to(torch.bfloat16))
    assert set(optimizer.states.tensors()) == {"master/w", "exp_avg/w", "exp_avg_sq/w"}


@pytest.mark.parametrize("count", [2, 5])
def test_fp32_states_equal_the_formula_in_fp64(count: int) -> None:
    """The module's formulas, written out once more in FP64."""
    shape = (32, 48)
    value, gradients = initial(shape), gradients_for(shape, count)
    optimizer, _ = single(AdamW, StateFormats(), value)
    w, m, v = value.double(), torch.zeros(shape).double(), torch.zeros(shape).double()
    s = SETTINGS
    for step, g in enumerate((gradient.double() for gradient in gradients), 1):
        run_step(optimizer, {"w": g.float()}, step)
        m = s.beta1 * m + (1 - s.beta1) * g
        v = s.beta2 * v + (1 - s.beta2) * g * g
        update = m / (1 - s.beta1**step) / ((v / (1 - s.beta2**step)).sqrt() + s.eps)
        w = w - s.lr * s.weight_decay * w - s.lr * update
    moved = (w - value.double()).norm()
    assert (optimizer.states.master("w").double() - w).norm() < 1e-5 * moved
    assert (optimizer.states.decoded("w", "exp_avg_sq").double() - v).norm() < 1e-6 * v.norm()


def test_formats_are_chosen_by_global_shape() -> None:
    shapes = {"w": (64, 128), "shard": (16, 128), "norm": (128,), "head": (64, 128), "bf16": (64, 128)}
    specs = {
        "w": matrix_spec("w", (64, 128)),
        "shard": matrix_spec("shard", (64, 128)),  # a quarter of the rows
        "norm": matrix_spec("norm", (128,), role="norm"),
        "head": matrix_spec("head", (64, 128), in_fp8_plan=False, role="head"),
        "bf16": matrix_spec("bf16", (64, 128), in_fp8_plan=False),
    }
    parameters = {k: nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for k, s in shapes.items()}
    optimizer = Optimizer(
        AdamW(SETTINGS), parameters, specs, O2, seed=0, regions={"shard": Region((16, 128), (16, 0))}
    )
    tensors = optimizer.states.tensors()
    for fqn in ("w", "shard"):
        assert tensors[f"master/{fqn}.payload"].dtype == torch.float16
        assert tensors[f"exp_avg/{fqn}.payload"].dtype == torch.float8_e4m3fn
        assert tensors[f"exp_avg/{fqn}.payload"].shape == shapes[fqn]
        assert tensors[f"exp_avg/{fqn}.scale"].shape == (shapes[fqn][0], 1)
        assert tensors[f"exp_avg_sq/{fqn}.payload"].dtype == torch.float16
    for fqn in ("norm", "head", "bf16"):
        for role in ("master", "exp_avg", "exp_avg_sq"):
            assert tensors[f"{role}/{fqn}"].dtype == torch.float32
    assert optimizer.states.num_elements(in_plan_only=True) == (64 + 16) * 128
    assert optimizer.states.stored_bytes(in_plan_only=False)["exp_avg"] == 80 * 129 + 4 * (128 + 2 * 64 * 128)


def test_fp64_parameters_keep_fp64() -> None:
    parameter = nn.Parameter(torch.ones(4, 32, dtype=torch.float64))
    optimizer = Optimizer(
        AdamW(SETTINGS), {"w": parameter}, {"w": matrix_spec("w", (4, 32))}, StateFormats(), seed=0
    )
    assert {t.dtype for t in optimizer.states.tensors().values()} == {torch.float64}
    assert optimizer.states.master("w").data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize(
    ("plan", "at_most", "exactly"),
    [
        (StateFormats(), 12.0, 12.0),
        (O1, 10.1, 10 + 1 / 128),
        (O2, 5.1, 5 + 3 / 128),
        (O2_BYTES, 4.2, 4 + 3 / 128),
        (O2_EXPANDED, 4.2, 4 + 7 / 128),
        (StateFormats(FP16_MASTER, F("e4m3"), F("e5m2", rounding=SR)), 4.2, 4 + 3 / 128),
        (PAPER, 5.1, 5.0),
    ],
    ids=str,
)
def test_stored_bytes_per_parameter(plan: StateFormats, at_most: float, exactly: float) -> None:
    optimizer, _ = single(AdamW, plan, torch.zeros(512, 1024))
    stored = optimizer.states.stored_bytes(in_plan_only=True)
    per_parameter = sum(stored.values()) / optimizer.states.num_elements(in_plan_only=True)
    assert per_parameter <= at_most
    assert per_parameter == pytest.approx(exactly, abs=1e-4)
    tensors = optimizer.states.tensors().values()
    assert sum(t.numel() * t.element_size() for t in tensors) == sum(stored.values())


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_resume_is_bit_identical(rule: str, name: str) -> None:
    shape = (24, 192)
    plan = PLANS[name]
    settings: RuleSettings = SETTINGS
    if rule == "lion":
        plan, settings = StateFormats(plan.master, plan.exp_avg, None), LION
    gradients = gradients_for(shape, 8)

    def fresh(value: Tensor) -> tuple[Optimizer, nn.Parameter]:
        return single(AdamW if rule == "adamw" else Lion, plan, value, settings=settings)

    whole, whole_weight = fresh(initial(shape))
    for step, gradient in enumerate(gradients[:4], 1):
        run_step(whole, {"w": gradient}, step)
    saved = {key: tensor.clone() for key, tensor in whole.states.tensors().items()}
    resumed, resumed_weight = fresh(torch.zeros(shape))
    for key, tensor in resumed.states.tensors().items():
        tensor.view(torch.uint8).copy_(saved[key].view(torch.uint8)) if tensor.dim() else tensor.copy_(
            saved[key]
        )
    resumed.check_state_meta(whole.state_meta())
    resumed.publish()
    assert torch.equal(resumed_weight, whole_weight)
    for step, gradient in enumerate(gradients[4:], 5):
        run_step(whole, {"w": gradient}, step)
        run_step(resumed, {"w": gradient}, step)
    assert torch.equal(resumed_weight, whole_weight)
    for key, tensor in resumed.states.tensors().items():
        assert same_bytes(tensor, whole.states.tensors()[key]), key


@pytest.mark.parametrize("name", PLANS)
def test_bits_do_not_depend_on_the_chunk(name: str) -> None:
    shape = (48, 192)
    results = []
    for chunk in (192, 192 * 7, 1 << 20):
        optimizer, parameter = single(AdamW, PLANS[name], initial(shape), chunk=chunk)
        for step, gradient in enumerate(gradients_for(shape, 4), 1):
            run_step(optimizer, {"w": gradient}, step)
        results.append((parameter, optimizer.states.tensors()))
    for parameter, tensors in results[1:]:
        assert torch.equal(parameter, results[0][0])
        for key, tensor in tensors.items():
            assert same_bytes(tensor, results[0][1][key]), key


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("O2", (32, 192)), ("O2 expanded v", (32, 192)), ("remainder", (32, 192)), ("fp32", (6, 74))],
)
def test_ranks_that_hold_parts_have_the_bits_of_the_whole(
    name: str, shape: tuple[int, int], dim: int
) -> None:
    """FP32: neither whole nor part is a multiple of the vectors that torch's fused kernel works on."""
    gradients = gradients_for(shape, 4)
    whole, whole_weight = single(AdamW, PLANS[name], initial(shape))
    shards = []
    for index in (0, 1):
        spec = replace(matrix_spec("w", shape), shard=Shard(dim, index, 2))
        parameter = nn.Parameter(spec.local(initial(shape)).to(torch.bfloat16).contiguous())
        shard = Optimizer(AdamW(SETTINGS), {"w": parameter}, {"w": spec}, PLANS[name], seed=1)
        shard.states.seed_master("w", initial(shape))
        shard.publish()
        shards.append((shard, parameter, spec))
    for step, gradient in enumerate(gradients, 1):
        run_step(whole, {"w": gradient}, step)
        for shard, _, spec in shards:
            run_step(shard, {"w": spec.local(gradient).contiguous()}, step)
    assert torch.equal(whole_weight, torch.cat([parameter for _, parameter, _ in shards], dim=dim))


def test_a_row_that_cuts_a_block_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(8, 96, dtype=torch.bfloat16))
    spec = replace(matrix_spec("w", (8, 384)), shard=Shard(1, 0, 4))
    with pytest.raises(ValueError, match=r"w: a local row of 96 .* block of 128; legal: multiples of 128"):
        Optimizer(AdamW(SETTINGS), {"w": parameter}, {"w": spec}, O2, seed=0)


def test_random_bits_are_those_of_seed_and_step() -> None:
    def after(seed: int, first_step: int) -> Tensor:
        optimizer, _ = single(AdamW, O2, initial((8, 128)), seed=seed)
        optimizer.rule.settings = AdamWSettings(lr=1e-5, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.1)
        run_step(optimizer, {"w": gradients_for((8, 128), 1)[0]}, first_step)
        return optimizer.states.master("w")

    assert torch.equal(after(1, 1), after(1, 1))
    assert not torch.equal(after(1, 1), after(2, 1))
    assert not torch.equal(after(1, 1), after(1, 2))


@pytest.mark.parametrize("name", PLANS)
def test_parameters_are_the_rounding_of_the_stored_master(name: str) -> None:
    optimizer, parameter = single(AdamW, PLANS[name], initial((24, 192)))
    for step, gradient in enumerate(gradients_for((24, 192), 3), 1):
        run_step(optimizer, {"w": gradient}, step)
        assert torch.equal(parameter, optimizer.states.master("w").to(torch.bfloat16))
    before = parameter.detach().clone()
    optimizer.publish()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_zero_gradients_leave_finite_states(rule: str, name: str) -> None:
    plan, settings = PLANS[name], SETTINGS
    if rule == "lion":
        plan, settings = StateFormats(plan.master, plan.exp_avg, None), LION  # type: ignore[assignment]
    value = initial((8, 256))
    value[3] = 0.0
    optimizer, parameter = single(AdamW if rule == "adamw" else Lion, plan, value, settings=settings)
    gradient = torch.zeros(8, 256)
    for step in (1, 2):
        run_step(optimizer, {"w": gradient}, step)
        gradient[5] = 1e-30  # squares to zero
    for role in optimizer.states.roles:
        assert torch.isfinite(optimizer.states.decoded("w", role)).all()
    assert float((parameter.detach().float() - value).abs().max()) < 2e-3
    assert bool((parameter[3] == 0).all())


def test_a_master_that_outgrows_its_scale_in_one_step_does_not_saturate() -> None:
    """From zero, and by a factor of 10^6, within a step."""
    for plan in (O1, StateFormats(F("fp16_scaled", granularity="tensor"))):
        optimizer, _ = single(AdamW, plan, torch.zeros(4, 128))
        for step, lr in ((1, 1e-3), (2, 1e3), (3, 1e-3)):
            optimizer.rule.settings = AdamWSettings(lr=lr, beta1=0.9, beta2=0.95, eps=1e-30, weight_decay=0.0)
            run_step(optimizer, {"w": torch.ones(4, 128)}, step)
            expected = {1: -1e-3, 2: -1000.001, 3: -1000.002}[step]
            torch.testing.assert_close(
                optimizer.states.master("w"), torch.full((4, 128), expected), rtol=1e-3, atol=0
            )


def test_a_second_moment_may_jump() -> None:
    """Gradients grow by 10^4 in a step, the second moment by 10^8."""
    for plan in (O2, O2_BYTES, O2_EXPANDED, PAPER):
        optimizer, _ = single(AdamW, plan, torch.zeros(4, 128))
        for step, size in ((1, 1e-7), (2, 1e-3)):
            run_step(optimizer, {"w": torch.full((4, 128), size)}, step)
        expected = 0.05 * 1e-6
        v = optimizer.states.decoded("w", "exp_avg_sq").double()
        assert float((v / expected - 1).abs().max()) < 0.26, str(plan)  # a unit of E4M3's root is 2^-3


@dataclass
class Fp8Target:
    """A weight target that casts per tensor."""

    numel: int
    codes: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    calls: list[str] = field(default_factory=list)

    def begin(self, amax: Tensor) -> None:
        assert amax.dtype == torch.float32 and amax.dim() == 0
        self.scale = 2.0 ** torch.floor(torch.log2(448.0 / amax))
        self.codes = torch.zeros(self.numel).to(torch.float8_e4m3fn)
        self.calls.append("begin")

    def write(self, start: int, stop: int, values: Tensor) -> None:
        assert values.dtype == torch.float32
        self.codes[start:stop] = (values * self.scale).to(torch.float8_e4m3fn)
        self.calls.append(f"{start}-{stop}")

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("name", PLANS)
def test_weight_targets_get_the_stored_master(name: str) -> None:
    shape = (16, 192)
    target = Fp8Target(16 * 192)
    placeholder = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    optimizer = Optimizer(
        AdamW(SETTINGS),
        {"w": placeholder},
        {"w": matrix_spec("w", shape)},
        PLANS[name],
        seed=1,
        weight_targets={"w": target},
        device=torch.device("cpu"),
        chunk=1536,
    )
    optimizer.states.seed_master("w", initial(shape))
    optimizer.publish()
    for step, gradient in enumerate(gradients_for(shape, 3), 1):
        run_step(optimizer, {"w": gradient}, step)
        master = optimizer.states.master("w").view(-1)
        scale = 2.0 ** torch.floor(torch.log2(448.0 / master.abs().max()))
        assert float(target.scale) == float(scale)
        assert same_bytes(target.codes, (master * scale).to(torch.float8_e4m3fn))
    after_step = target.codes.clone()
    target.calls.clear()
    optimizer.publish()
    assert same_bytes(target.codes, after_step)
    assert target.calls == ["begin", "0-1536", "1536-3072", "end"]


def test_flushed_share_is_counted() -> None:
    shape = (16, 256)
    gradient = gradients_for(shape, 1)[0]
    plan = StateFormats(exp_avg=F("e4m3"), exp_avg_sq=F("e4m3", granularity="tensor"))
    optimizer, _ = single(AdamW, plan, initial(shape))
    assert optimizer.statistics() == {}
    run_step(optimizer, {"w": gradient}, 1, count_flushed=True)
    statistics = optimizer.statistics()
    v = 0.05 * gradient.double() ** 2
    scale = 2.0 ** torch.floor(torch.log2(448.0 / v.max()))
    expected = float((v * scale <= 2.0**-10).double().mean())  # half of E4M3's smallest number
    assert expected > 0.2
    assert float(statistics["flushed/exp_avg_sq"]) == pytest.approx(expected, abs=2 / v.numel())
    assert float(statistics["flushed/exp_avg"]) < 0.01
    assert set(statistics) == {"flushed/exp_avg", "flushed/exp_avg_sq"}


def test_another_rule_in_the_checkpoint_is_refused() -> None:
    optimizer, _ = single(AdamW, O2, initial((8, 128)))
    other, _ = single(AdamW, O1, initial((8, 128)))
    lion, _ = single(Lion, StateFormats(exp_avg_sq=None), initial((8, 128)), settings=LION)
    optimizer.check_state_meta(other.state_meta())  # other formats: its states are recast
    with pytest.raises(ValueError, match="rule is adamw, but the checkpoint was written with lion"):
        optimizer.check_state_meta(lion.state_meta())


def test_a_plan_that_does_not_fit_the_rule_is_refused() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(2, 32))}
    specs = {"w": matrix_spec("w", (2, 32))}
    with pytest.raises(ValueError, match="lion keeps no second moment, but its format is fp32"):
        Optimizer(Lion(LION), parameters, specs, StateFormats(), seed=0)
    with pytest.raises(ValueError, match="adamw keeps a second moment, but its format is None"):
        Optimizer(AdamW(SETTINGS), parameters, specs, StateFormats(exp_avg_sq=None), seed=0)


def test_lion_moves_by_the_sign() -> None:
    value = torch.ones(4, 32, dtype=torch.float64)
    optimizer, _ = single(
        Lion,
        StateFormats(exp_avg_sq=None),
        value,
        settings=RuleSettings(lr=0.125, beta1=0.5, beta2=0.75, weight_decay=0.0),
    )
    # m: 0 → 1 → 0.25 → 0.125; directions of 0.5·m + 0.5·g: +, -, 0
    for step, (size, weight, moment) in enumerate(
        ((4.0, 0.875, 1.0), (-2.0, 1.0, 0.25), (-0.25, 1.0, 0.125)), 1
    ):
        run_step(optimizer, {"w": torch.full((4, 32), size)}, step)
        assert optimizer.states.master("w").unique().tolist() == [weight]
        assert optimizer.states.decoded("w", "exp_avg").unique().tolist() == [moment]
