"""The delayed-scaling rule against a model of it in plain Python numbers, and who may move a scale."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fp8train.numerics.scale_state import ScaleState, named_events, record_amax
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec

CPU = torch.device("cpu")
SPECS = {
    "max": QuantSpec(E4M3, scale_source="delayed", history=4),
    "long": QuantSpec(E4M3, scale_source="delayed"),
    "recent": QuantSpec(E5M2, scale_source="delayed", history=3, reduce="most_recent"),
    "single": QuantSpec(E4M3, scale_source="delayed", history=1, margin=2),
    "interval": QuantSpec(E5M2, scale_source="delayed", history=5, interval=3, margin=1),
    "recent, interval": QuantSpec(E4M3, scale_source="delayed", reduce="most_recent", interval=4),
    "free": QuantSpec(E4M3, scale_source="delayed", history=4, power_of_two=False, margin=1),
}


def alone(tensor: Tensor) -> None:
    """The MAX all-reduce of one rank."""


@dataclass
class PlainSlot:
    """One slot by the rule of the module docstring."""

    spec: QuantSpec
    history: list[float] = field(default_factory=list)
    scale: float = 0.0
    zero: int = 0
    non_finite: int = 0

    def advance(self, amaxes: Sequence[float], step: int, *, applied: bool) -> None:
        bad = any(not math.isfinite(a) for a in amaxes)
        amax = max((a for a in amaxes if math.isfinite(a)), default=0.0)
        self.non_finite += bad
        self.zero += not bad and amax == 0
        if not applied or bad or amax == 0:
            return
        self.history = [amax, *self.history][: self.spec.history]
        if step % self.spec.interval == 0 or self.scale == 0:
            self.scale = self.from_amax(max(self.history) if self.spec.reduce == "max" else amax)

    def from_amax(self, amax: float) -> float:
        limit = self.spec.format.max / 2**self.spec.margin
        if not self.spec.power_of_two:
            return float(torch.tensor(min(max(limit / amax, 2.0**-126), 2.0**126)))
        k = -126
        while k < 126 and amax * 2.0 ** (k + 1) <= limit:
            k += 1
        return 2.0**k


def record(state: ScaleState, name: str, amaxes: Sequence[float]) -> None:
    for amax in amaxes:
        running = state.slot(name, record=True).amax
        assert running is not None
        record_amax(torch.tensor(amax), running)


def random_amaxes(rng: random.Random) -> list[float]:
    """Amaxes of the micro-batches of a step: mostly ordinary, sometimes tiny, huge, zero or not finite."""
    kind = rng.random()
    if kind < 0.1:
        return [0.0] * 3
    amaxes = [float(torch.tensor(2.0 ** rng.uniform(-12, 12))) for _ in range(rng.randint(1, 4))]
    if kind < 0.2:
        amaxes[rng.randrange(len(amaxes))] = rng.choice([math.inf, math.nan])
    if kind > 0.95:
        amaxes.append(rng.choice([2.0**-148, 1.5 * 2.0**127]))
    return amaxes


def scale_of(state: ScaleState, name: str) -> float:
    return float(state.slot(name, record=False).scale)


def check(state: ScaleState, name: str, plain: PlainSlot) -> None:
    scale = scale_of(state, name)
    if plain.spec.power_of_two:
        assert scale == plain.scale
    else:
        assert scale == pytest.approx(plain.scale, rel=2**-23)
    assert math.isfinite(scale)
    tensors = state.state_tensors()
    stored = tensors[f"scale_state/amax_history/{name}"].tolist()
    assert stored == plain.history + [0.0] * (plain.spec.history - len(plain.history))
    assert tensors[f"scale_state/events/{name}"].tolist() == [plain.zero, plain.non_finite]


@pytest.mark.parametrize("seed", range(4))
def test_rule(seed: int) -> None:
    """40 steps of slots with different specs side by side; some steps are skipped."""
    print("seed", seed)
    rng = random.Random(seed)
    slots = {f"layers.{i}/{name}": spec for i in range(2) for name, spec in SPECS.items()}
    state, plain = ScaleState(slots, CPU), {name: PlainSlot(spec) for name, spec in slots.items()}
    step = 0
    for _ in range(40):
        applied = rng.random() > 0.15
        with state.recording():
            batches = {name: random_amaxes(rng) for name in slots}
            for name, amaxes in batches.items():
                record(state, name, amaxes)
        state.advance(alone, applied=applied)
        for name, amaxes in batches.items():
            plain[name].advance(amaxes, step, applied=applied)
            check(state, name, plain[name])
        step += applied
    assert int(state.steps) == step
    assert named_events(state.names, state.events) == {
        name: {"zero": one.zero, "non_finite": one.non_finite}
        for name, one in plain.items()
        if one.zero or one.non_finite
    }


def run(state: ScaleState, steps: Sequence[Sequence[float]]) -> list[float]:
    """The scale of slot ``a`` after each step."""
    scales = []
    for amaxes in steps:
        with state.recording():
            record(state, "a", amaxes)
        state.advance(alone, applied=True)
        scales.append(scale_of(state, "a"))
    return scales


def test_rule_by_hand() -> None:
    """448 = 1.75 · 2^8: an amax of 1 gets 2^8, 2 gets 2^7, 56 = 1.75 · 2^5 gets 2^3."""
    spec = QuantSpec(E4M3, scale_source="delayed", history=2)
    assert run(ScaleState({"a": spec}, CPU), [[1], [0.5, 2], [1], [1]]) == [256, 128, 128, 256]
    recent = QuantSpec(E4M3, scale_source="delayed", history=2, reduce="most_recent")
    assert run(ScaleState({"a": recent}, CPU), [[1], [2], [1]]) == [256, 128, 256]
    slow = QuantSpec(E4M3, scale_source="delayed", history=1, interval=2, margin=1)
    assert run(ScaleState({"a": slow}, CPU), [[1], [56], [2], [56]]) == [128, 128, 64, 64]


@pytest.mark.parametrize("amax", [math.inf, math.nan, -math.nan])
def test_a_non_finite_amax_keeps_the_scale(amax: float) -> None:
    """MS-AMP turned 8 into 0.125 here: it took the exponent of the infinity and inverted the old scale."""
    state = ScaleState({"a": SPECS["max"]}, CPU)
    assert run(state, [[56.0], [1.0, amax, 2.0], [0.0], [28.0]]) == [8.0, 8.0, 8.0, 8.0]
    assert named_events(state.names, state.events) == {"a": {"zero": 1, "non_finite": 1}}
    cold = ScaleState({"a": SPECS["max"]}, CPU)
    assert run(cold, [[amax], [0.0], [56.0]]) == [0.0, 0.0, 8.0]  # still warming up, then the first usable


def test_skipped_steps_leave_scales_alone() -> None:
    state = ScaleState({"a": SPECS["max"], "b": SPECS["recent"]}, CPU)
    run(state, [[3.0], [5.0]])
    before = {name: tensor.clone() for name, tensor in state.state_tensors().items()}
    with state.recording():
        record(state, "a", [100.0, math.nan])
        record(state, "b", [100.0])
    state.advance(alone, applied=False)
    changed = {n for n, tensor in state.state_tensors().items() if not torch.equal(tensor, before[n])}
    assert changed == {"scale_state/events/a"}
    assert run(state, [[1.0]]) == [64.0]  # max(1, 5, 3): nothing of the skipped step is left


def test_order_of_micro_batches_does_not_matter() -> None:
    amaxes = [0.3, 7.0, 2.5, 0.0, 6.9]
    states = []
    for order in (amaxes, amaxes[::-1], sorted(amaxes), amaxes * 2):
        state = ScaleState({"a": SPECS["max"]}, CPU)
        run(state, [order, order[:2] + order[2:]])
        states.append(state)
    for state in states[1:]:
        for a, b in zip(state.state_tensors().values(), states[0].state_tensors().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("poison", [1.0, math.nan, math.inf])
def test_ranks_agree(poison: float) -> None:
    """Two ranks, one of which may see a NaN, end as one rank that saw everything."""
    slots = {"a": SPECS["max"], "b": SPECS["interval"]}
    ranks, whole = [ScaleState(slots, CPU) for _ in range(2)], ScaleState(slots, CPU)
    for step in range(4):
        seen = [[[2.0 + step, 0.5], [poison if step == 2 else 9.0]], [[1.0], [0.25 * step]]]
        with whole.recording(), ranks[0].recording(), ranks[1].recording():
            for state, of_rank in zip(ranks, seen, strict=True):
                for name, amaxes in zip(slots, of_rank, strict=True):
                    record(state, name, amaxes)
                    record(whole, name, amaxes)
        maximum = torch.maximum(ranks[0].amaxes, ranks[1].amaxes)
        assert not maximum.isnan().any()  # what MAX does with NaN differs between backends
        for state in ranks:
            state.advance(lambda tensor, maximum=maximum: tensor.copy_(maximum), applied=True)  # type: ignore[misc]
        whole.advance(alone, applied=True)
    for state in ranks:
        for a, b in zip(state.state_tensors().values(), whole.state_tensors().values(), strict=True):
            assert torch.equal(a, b)
    assert ("b" in named_events(whole.names, whole.events)) is not math.isfinite(poison)


def test_one_all_reduce_of_one_tensor() -> None:
    calls: list[Tensor] = []
    state = ScaleState(SPECS, CPU)
    with state.recording():
        record(state, "max", [3.0])
    state.advance(calls.append, applied=True)
    assert [(t.dtype, tuple(t.shape)) for t in calls] == [(torch.float32, (len(SPECS),))]
    empty = ScaleState({}, CPU)
    empty.advance(calls.append, applied=True)
    assert len(calls) == 1
    assert empty.state_tensors() == {}


def test_recording_is_off_by_default_and_starts_afresh() -> None:
    state = ScaleState({"a": SPECS["max"]}, CPU)
    assert not state.active
    with state.recording():
        assert state.active
        record(state, "a", [1000.0])
    assert not state.active
    with pytest.raises(KeyError), state.recording():
        raise KeyError
    assert not state.active
    assert run(state, [[1.0]]) == [256.0]


@pytest.mark.parametrize("at", [1, 3, 8])
def test_resume_is_bit_identical(at: int) -> None:
    rng = random.Random(3)
    steps = [{name: random_amaxes(rng) for name in SPECS} for _ in range(12)]

    def go(state: ScaleState, some: Sequence[dict[str, list[float]]]) -> None:
        for amaxes in some:
            with state.recording():
                for name, values in amaxes.items():
                    record(state, name, values)
            state.advance(alone, applied=True)

    whole, first, second = (ScaleState(SPECS, CPU) for _ in range(3))
    go(whole, steps)
    go(first, steps[:at])
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    for name, tensor in second.state_tensors().items():
        tensor.copy_(saved[name])  # as a checkpoint does: in place
    go(second, steps[at:])
    for (name, a), b in zip(second.state_tensors().items(), whole.state_tensors().values(), strict=True):
        assert torch.equal(a, b), name


def test_state_tensors_by_slot() -> None:
    tensors = ScaleState({"layers.0.mlp.up/output.x": SPECS["max"], "b": SPECS["long"]}, CPU).state_tensors()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "scale_state/steps": (torch.int64, (1,)),
        "scale_state/amax_history/layers.0.mlp.up/output.x": (torch.float32, (4,)),
        "scale_state/scale/layers.0.mlp.up/output.x": (torch.float32, (1,)),
        "scale_state/events/layers.0.mlp.up/output.x": (torch.int64, (2,)),
        "scale_state/amax_history/b": (torch.float32, (16,)),
        "scale_state/scale/b": (torch.float32, (1,)),
        "scale_state/events/b": (torch.int64, (2,)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_only_delayed_casts_have_slots() -> None:
    with pytest.raises(ValueError, match=r"layers\.0/x: e4m3:cur/tensor/pow2 keeps no scale state"):
        ScaleState({"layers.0/x": QuantSpec(E4M3)}, CPU)
