"""The fused pass against the pass in chunks, what it leaves to that, and what it moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8train.kernels.fused_op import OPERATIONS, Cost
from fp8train.kernels.optimizer_update import optimizer_update
from fp8train.layers.fp8_weight import ResidentFp8Weight
from fp8train.models.param_spec import Shard
from fp8train.numerics.block_scales import dequantize_blocks, from_blocks
from fp8train.optim.gradient import TensorGradient
from fp8train.optim.optimizer import Optimizer
from fp8train.optim.parameter_state import Region
from fp8train.parallel.gradients.held import GradientReader, HeldTensors, StoredGradient
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamW
from tests.optim.fused_cases import Run, in_blocks, in_fp32
from tests.optim.state_cases import COAT, O1, O2, PAPER, SETTINGS, matrix_spec, run_step
from tests.training.tiny import alone, losses, tiny_config

SHAPES: dict[str, tuple[int, ...]] = {"a": (24, 256), "b": (10, 257), "norm": (130,)}


def ulps(x: Tensor, y: Tensor, scale: Tensor) -> float:
    """Largest distance in units in the last place of FP32 numbers as large as ``scale``."""
    unit = torch.exp2(torch.frexp(scale)[1].double() - 24)
    return float(((x.double() - y.double()).abs() / unit).max())


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_one_step_in_fp32_is_that_of_the_chunks_to_an_ulp(rule: str) -> None:
    """From the same states, in units of the largest of old value, new value and, of masters, step: torch's
    ``lerp`` fuses product and sum on a CPU, its ``sqrt`` is not always the nearest number, its AdamW orders
    products differently."""
    shapes = {"a": (64, 256)}
    runs = [
        Run(shapes, StateFormats(), rule=rule, dtype=torch.float32, update=update)
        for update in (optimizer_update, None)
    ]
    for run in runs[1:]:
        for step in (1, 2):
            run.step(step)
    for name, tensor in runs[0].memory().items():
        tensor.copy_(runs[1].memory()[name])
    roles = [role for role in ("master", "exp_avg", "exp_avg_sq") if f"{role}/a" in runs[1].memory()]
    before = {role: runs[1].optimizer.states.decoded("a", role).clone() for role in roles}
    for run in runs:
        run.step(3)
    for role in roles:
        ours, theirs = (run.optimizer.states.decoded("a", role) for run in runs)
        step = run.optimizer.rule.settings.lr if role == "master" else 0.0
        distance = ulps(ours, theirs, torch.maximum(theirs.abs(), before[role].abs()).clamp(min=step))
        print(f"{role}: {int((ours != theirs).sum())} of {ours.numel()} differ, by up to {distance} units")
        assert distance <= 1


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_one_step_at_o2_has_nearly_all_codes_of_the_chunks(rule: str) -> None:
    """From the same states; the kernel itself. Codes that differ are neighbours, or zeros of either sign."""
    runs = [Run(SHAPES, O2, rule=rule, update=update) for update in (optimizer_update.launch, None)]
    for step in (1, 2):
        runs[1].step(step, in_blocks)
    for name, tensor in runs[0].memory().items():
        theirs = runs[1].memory()[name]
        tensor.view(torch.uint8).copy_(theirs.contiguous().view(torch.uint8))
    for run in runs:
        run.step(3, in_blocks)
    theirs = runs[1].memory()
    for name, ours in runs[0].memory().items():
        if name.endswith("norm"):  # FP32: to rounding
            assert torch.allclose(ours.float(), theirs[name].float(), rtol=1e-6, atol=1e-9), name
            continue
        wide = torch.int16 if ours.element_size() == 2 else torch.uint8
        codes = [x.contiguous().view(wide).int() for x in (ours, theirs[name])]
        other = codes[0] != codes[1]
        share = other.float().mean()
        print(f"{name}: {int(other.sum())} of {other.numel()} codes differ")
        assert share < 2e-3, name
        values = [x.float() for x in (ours, theirs[name])]
        adjacent = ((codes[0] - codes[1]).abs() == 1) | ((values[0] == 0) & (values[1] == 0))
        assert adjacent[other].all(), name


def test_parts_have_the_bits_of_the_whole() -> None:
    whole = Run({"a": (8, 256)}, O2, update=optimizer_update)
    parts = [Run({"a": (8, 256)}, O2, shard=Shard(1, i, 2), update=optimizer_update) for i in (0, 1)]
    for step in (1, 2, 3):
        for run in (whole, *parts):
            run.step(step, in_blocks)
    assert torch.equal(whole.weights["a"], torch.cat([part.weights["a"] for part in parts], dim=1))


def test_a_rank_without_rows_updates_nothing() -> None:
    spec, weight = matrix_spec("w", (4, 128)), torch.empty(0, 128)
    optimizer = Optimizer(
        AdamW(SETTINGS),
        {"w": weight},
        {"w": spec},
        O2,
        seed=1,
        regions={"w": Region((0, 128), (4, 0))},
        update=optimizer_update.launch,
    )
    run_step(optimizer, {"w": weight}, 1)
    assert optimizer.weight_amax() == {} and optimizer.describe_pass() == "optimizer step: 0 parameters fused"


@pytest.mark.parametrize("shape", [(6, 128), (6, 200), (6, 257)])
def test_rows_of_a_gradient_lie_where_they_are_said_to(shape: tuple[int, int]) -> None:
    """As a rank of ZeRO reads its rows of a gradient that all ranks hold."""
    reader = in_blocks(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    width, rows = shape[1], slice(2, 5)
    part = replace(reader, offset=rows.start * width)  # type: ignore[type-var]
    stored = part.stored(3 * width)
    assert stored is not None and stored.scales is not None
    values = from_blocks(dequantize_blocks(stored.values, stored.scales), (3, width))
    assert torch.equal(values.reshape(-1), part.chunk(0, 3 * width))
    assert part.stored(width + 1) is None


def in_one_scale(gradient: Tensor) -> GradientReader:
    class Reader:
        held = HeldTensors([gradient.to(torch.float8_e4m3fn).view(-1)], torch.ones(1))

        def chunk(self, start: int, stop: int) -> Tensor:
            return self.held.chunk(0, start, stop)

        def stored(self, count: int) -> StoredGradient | None:
            return self.held.stored(0, 0, count)

    return Reader()


@pytest.mark.parametrize(
    ("plan", "form", "why"),
    [
        (PAPER, in_blocks, "master in fp16_scaled/tensor"),
        (COAT, in_blocks, "exp_avg in e4m3/block128/expanded"),
        (replace(O2, exp_avg=StateFormat("e4m3", block=64)), in_blocks, "states in blocks of 64 and 128"),
        (O2, lambda g: in_blocks(g, E4M3, 64), "a gradient in blocks of 64 and states in blocks of 128"),
        (O2, in_one_scale, "a gradient that has one scale, is a sum of integers or is in FP64"),
        (StateFormats(StateFormat("fp64")), in_fp32, "FP64"),
    ],
)
def test_the_rest_is_updated_in_chunks_and_said_so(plan: StateFormats, form: Any, why: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (4, 128), "b": (3, 256), "norm": (70,)}
    run, chunks = Run(shapes, plan, update=optimizer_update), Run(shapes, plan)
    run.step(1, form)
    chunks.step(1, form)
    assert run.optimizer.describe_pass() == (
        f"optimizer step: 1 parameters fused in 1 launches; in chunks: 2 with {why}"
    )
    assert chunks.optimizer.describe_pass() == "optimizer step: in chunks"
    assert set(run.optimizer.weight_amax()) == {"norm"}
    for fqn in ("a", "b"):
        assert torch.equal(run.weights[fqn], chunks.weights[fqn])


def test_cpus_update_in_chunks_unless_told() -> None:
    run = Run({"a": (4, 128)}, O2)
    assert run.optimizer._fused is None and next(iter(run.optimizer.states.values())).chunk == 1 << 19


@pytest.mark.parametrize("rule", ["adamw", "lion"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_model_trains_to_the_losses_of_the_chunks(
    rule: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps; two roundings of the same numbers drift apart as two seeds of stochastic rounding do."""
    overrides = [f"precision.level={level}", f"optimizer.name={rule}"]
    overrides += ["optimizer.lr=0.001"] if rule == "lion" else []
    curves = []
    for update in (None, optimizer_update):
        monkeypatch.setattr("fp8train.optim.optimizer.default_update", lambda device, u=update: u)
        curve, trainer = losses(tiny_config(overrides), alone(), 20)
        curves.append(curve)
        print(trainer.optimizer.describe_pass(), curve)
    start, end = curves[0][0], sum(curves[0][-4:]) / 4
    assert end < start - 0.3  # it learns
    assert curves[1][0] == curves[0][0]
    for ours, theirs in zip(*curves, strict=True):
        assert abs(ours - theirs) < 0.003 * theirs


class Target:
    """Keeps what it is told."""

    def begin(self, amax: Tensor) -> None:
        self.amax = amax

    def write(self, start: int, stop: int, values: Tensor) -> None:
        self.values = values

    def end(self) -> None: ...


@pytest.mark.parametrize("update", [optimizer_update, optimizer_update.launch])
def test_targets_are_told_the_amax_of_the_stored_master(update: Any) -> None:
    target = Target()
    run = Run({"a": (4, 128), "b": (2, 128)}, O2, update=update, weight_targets={"a": target})
    before = run.weights["a"].detach().clone()
    run.step(1, in_blocks)
    master = run.optimizer.states.master("a")
    assert target.amax == master.abs().amax() and torch.equal(target.values.view(4, 128), master)
    assert run.optimizer.weight_amax()["b"].amax() == run.weights["b"].abs().amax()
    assert torch.equal(run.weights["a"], before)  # the target has it


def test_new_weights_have_new_versions() -> None:
    """What is made of a weight is made again: the FP8 copies of a linear ask for its version."""
    run = Run({"a": (4, 128)}, O2, update=optimizer_update.launch)
    version = run.weights["a"]._version
    run.step(1, in_blocks)
    assert run.weights["a"]._version > version


VIEWS = ("aten::empty", "aten::slice", "aten::unbind", "aten::view")


class Counted(TorchDispatchMode):
    """Costs of fused operations, and names of all other operations that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name in OPERATIONS:
            self.costs.append(OPERATIONS[name].cost(args, out))
        elif "meta" in {t.device.type for t in (*args, out) if isinstance(t, Tensor)}:
            self.others.append(name)
        return out


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (O2, 1 + 2 * 2 + 2 * 1 + 2 * 2 + 2 + 7 / 128),
        (O1, 1 + 2 * 2 + 2 * 4 + 2 * 4 + 2 + 3 / 128),
        (StateFormats(), 2 + 3 * 8 + 2),  # gradient in BF16
        (replace(O2, exp_avg_sq=StateFormat("e4m3", sqrt=True)), 1 + 2 * 2 + 2 * 1 + 2 * 1 + 2 + 7 / 128),
        (replace(O2, master=StateFormat("bf16_remainder")), 1 + 2 * 4 + 2 * 1 + 2 * 2 + 5 / 128),
    ],
    ids=str,
)
def test_a_step_moves_each_byte_once_and_launches_once(plan: StateFormats, expected: float) -> None:
    """Counted on the meta device, at 2^26 elements: the gradient; master, moments, each read and written; the
    weight, where it is not half of the master."""
    shape, meta = (1 << 13, 1 << 13), torch.device("meta")
    weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=meta))
    optimizer = Optimizer(AdamW(SETTINGS), {"w": weight}, {"w": matrix_spec("w", shape)}, plan, seed=1)
    gradient: Any = TensorGradient(torch.empty(shape, dtype=torch.bfloat16, device=meta))
    if plan != StateFormats():
        gradient = in_blocks(torch.empty(shape, device=meta))
    with Counted() as counted:
        optimizer.step(
            lambda _: gradient, step=1, lr_factor=1.0, grad_multiplier=torch.empty((), device=meta)
        )
    (cost,) = counted.costs
    moved = cost.moved / weight.numel()
    print(f"{plan}: {moved:.2f} bytes per parameter, {counted.others}")
    assert cost.launches == 1 and moved == pytest.approx(expected, rel=1e-3)
    launched = [name for name in counted.others if not name.startswith(VIEWS)]
    assert launched in ([], ["aten::_to_copy"] * 3), launched  # two tables once, one for the step


def test_an_fp8_weight_is_written_in_one_more_launch() -> None:
    """Counted on the meta device: with the codes of a weight that exists in FP8 only, instead of BF16, in the
    layouts of forward and backward."""
    shape, meta = (1 << 13, 1 << 13), torch.device("meta")
    weight = torch.empty(shape, dtype=torch.bfloat16, device=meta)
    quant = LinearQuant(output_w=QuantSpec(E4M3), grad_input_w=QuantSpec(E4M3))
    target = ResidentFp8Weight(quant, torch.Size(shape), meta)
    specs = {"w": matrix_spec("w", shape)}
    optimizer = Optimizer(
        AdamW(SETTINGS), {"w": weight}, specs, O2, seed=1, weight_targets={"w": target}, device=meta
    )
    gradient, one = in_blocks(torch.empty(shape, device=meta)), torch.empty((), device=meta)
    with Counted() as counted:
        optimizer.step(lambda _: gradient, step=1, lr_factor=1.0, grad_multiplier=one)
        target.refresh(turned=True)
    moved = sum(cost.moved for cost in counted.costs) / weight.numel()
    assert [cost.launches for cost in counted.costs] == [1, 1]
    assert moved == pytest.approx(1 + 3 * 2 + 2 * 1 + 2 * 2 + 2 + 8 / 128, rel=1e-3)
    launched = [name for name in counted.others if not name.startswith(VIEWS)]
    views = ["aten::detach", "aten::t"]  # of the transposed codes
    assert launched == ["aten::_to_copy"] * 3 + ["aten::amax"] + views
