"""apex's AdamW and norms through a fake: against torch's AdamW in FP64, and what they leave to others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp8train.kernels.multi_tensor import choose_multi_tensor
from fp8train.kernels.optimizer_update import optimizer_update
from fp8train.kernels.package_kernels import AdamNumbers, MultiTensor
from fp8train.optim.gradient import TensorGradient
from fp8train.optim.optimizer import Optimizer
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.held import HeldValues
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamW
from tests.fakes import apex_fake
from tests.optim.fused_cases import Run, gradient_of, in_bf16, in_blocks, in_fp32
from tests.optim.state_cases import O2, SETTINGS, matrix_spec

CPU = torch.device("cpu")
SHAPES: dict[str, tuple[int, ...]] = {"a": (24, 256), "b": (10, 257), "norm": (130,)}
UNIT = 2.0**-24


def anywhere(device: torch.device) -> None:
    """The fake runs on any device."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return apex_fake.install(monkeypatch).calls


def kernels() -> MultiTensor:
    made = choose_multi_tensor(CPU, key="optimizer", wanted="apex", runs_on=anywhere)
    assert made is not None
    return made


def adamw_in_fp64(run: Run, steps: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's, of masters that were not rounded."""
    weights = {fqn: nn.Parameter(value.double()) for fqn, value in start.items()}
    peak = SETTINGS.lr * 0.5
    groups = []
    for fqn, weight in weights.items():
        spec = run.specs[fqn]
        # torch removes lr * weight_decay, as ours does under this rule.
        decay = 0.0 if spec.decay is None else SETTINGS.weight_decay
        assert spec.decay in (None, "lr_times_lambda")
        groups.append({"params": [weight], "lr": peak * spec.lr_mult, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps)
    for number in range(1, steps + 1):
        for fqn, weight in weights.items():
            weight.grad = gradient_of(run.specs[fqn].global_shape, number).double() * float(torch.tensor(0.7))
        optimizer.step()
    state = {fqn: optimizer.state[weight] for fqn, weight in weights.items()}
    masters = {f"master/{fqn}": weight.detach() for fqn, weight in weights.items()}
    return masters | {
        f"{role}/{fqn}": one[role] for fqn, one in state.items() for role in ("exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equals_torchs_adamw_in_fp64(dtype: torch.dtype, calls: list[str]) -> None:
    """States to FP32's rounding of three steps; weights are the nearest of their type."""
    run = Run(SHAPES, StateFormats(), dtype=dtype, multi_tensor=kernels())
    start = {fqn: run.optimizer.states.master(fqn).clone() for fqn in SHAPES}
    for number in (1, 2, 3):
        run.step(number)
    expected = adamw_in_fp64(run, 3, start)
    for name, exact in expected.items():
        got = run.memory().get(name)
        got = run.optimizer.states.master(name.partition("/")[2]) if got is None else got
        # β and ε arrive in FP32: 1-β is off by up to 2^-24 / (1-β); sums of small and large add their units.
        bound = 40 * UNIT * (exact.abs() + exact.abs().mean())
        assert ((got.double() - exact).abs() <= bound).all(), name
    for fqn, weight in run.weights.items():
        assert torch.equal(weight.detach(), run.optimizer.states.master(fqn).to(dtype)), fqn
    # Vectors have no decay and another rate than either matrix: three groups, one launch each.
    assert calls == ["multi_tensor_adam_capturable"] * 9


def test_equals_the_pass_in_chunks(calls: list[str]) -> None:
    """Our own, of FP32 states, to its own rounding; versions of weights move on."""
    runs = [Run(SHAPES, StateFormats(), multi_tensor=kernels()), Run(SHAPES, StateFormats())]
    versions = {fqn: weight._version for fqn, weight in runs[0].weights.items()}
    for run in runs:
        for number in (1, 2, 3):
            run.step(number)
    for name, theirs in runs[1].memory().items():
        bound = 2.0**-8 if theirs.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(runs[0].memory()[name].float(), theirs.float(), rtol=bound, atol=1e-9), name
    assert all(runs[0].weights[fqn]._version > version for fqn, version in versions.items())


@pytest.mark.parametrize("form", [in_bf16, in_blocks], ids=["bf16", "fp8 blocks"])
def test_gradients_of_other_types_are_widened(form: object, calls: list[str]) -> None:
    runs = [Run(SHAPES, StateFormats(), multi_tensor=kernels()), Run(SHAPES, StateFormats())]
    for run in runs:
        for number in (1, 2):
            run.step(number, form)  # type: ignore[arg-type]
    ours, theirs = (run.optimizer.states for run in runs)
    for fqn in SHAPES:
        for role in ("exp_avg", "exp_avg_sq", "master"):
            one, other = ours.decoded(fqn, role), theirs.decoded(fqn, role)
            assert ((one - other).abs() <= 40 * UNIT * (other.abs() + other.abs().mean())).all(), (fqn, role)
    assert calls.count("multi_tensor_scale") == (4 if form is in_bf16 else 0)


def test_a_step_without_a_rate_still_decays(calls: list[str]) -> None:
    """As the decay rules have it that do not depend on the rate; each parameter its own share."""
    spec = {fqn: replace(matrix_spec(fqn, (4, 64)), decay="constant") for fqn in "ab"}
    spec["b"] = replace(spec["b"], decay=None)
    weights = {fqn: nn.Parameter(torch.ones(4, 64)) for fqn in "ab"}
    rule = AdamW(replace(SETTINGS, weight_decay=0.25))
    optimizer = Optimizer(rule, weights, spec, StateFormats(), seed=1, multi_tensor=kernels())
    gradient = TensorGradient(torch.ones(256))
    optimizer.step(lambda _: gradient, step=1, lr_factor=0.0, grad_multiplier=torch.tensor(1.0))
    assert (weights["a"] == 0.75).all() and (weights["b"] == 1.0).all()
    assert (optimizer.states.decoded("a", "exp_avg") > 0).all()


def test_states_of_other_formats_are_left_to_ours(calls: list[str]) -> None:
    run = Run(SHAPES, O2, multi_tensor=kernels(), update=optimizer_update)
    run.step(1, in_blocks)
    line = run.optimizer.describe_pass()
    assert line.startswith("optimizer step: 1 parameters by apex's FusedAdam, not 2 with master in fp16"), (
        line
    )
    assert line.endswith("; the others: 2 parameters fused in 2 launches"), line
    plain = Run(SHAPES, O2, update=optimizer_update)
    plain.step(1, in_blocks)
    for name, theirs in plain.memory().items():
        if not name.endswith("norm"):
            assert torch.equal(run.memory()[name].view(torch.uint8), theirs.view(torch.uint8)), name
    halves = Run({"a": (4, 256)}, StateFormats(master=StateFormat("bf16_remainder")), multi_tensor=kernels())
    halves.step(1)
    assert "; the others: in chunks" in halves.optimizer.describe_pass()


def test_lion_is_left_to_ours(calls: list[str]) -> None:
    run = Run(SHAPES, StateFormats(), rule="lion", multi_tensor=kernels())
    run.step(1)
    assert "0 parameters by apex's FusedAdam, not 3 with rule lion" in run.optimizer.describe_pass()
    assert calls == []


def numbers(**others: float) -> AdamNumbers:
    return replace(AdamNumbers(1e-2, 0.9, 0.95, 1e-8, 3, 0.1), **others)  # type: ignore[arg-type]


def test_the_multiplier_and_the_step_are_read_on_the_device(calls: list[str]) -> None:
    """Of an FP64 scalar, as clipping gives it; the gradient is overwritten by what was used."""
    gradient, weight, first, second = (torch.full((70,), value) for value in (2.0, 1.0, 0.5, 0.25))
    kernels().adam([gradient], [weight], [first], [second], numbers(), torch.tensor(0.5, dtype=torch.float64))
    assert (gradient == 1.0).all()
    assert torch.allclose(first, torch.tensor(0.9 * 0.5 + 0.1)) and first._version == 1
    assert torch.allclose(second, torch.tensor(0.95 * 0.25 + 0.05))
    step = (0.55 / (1 - 0.9**3)) / ((0.2875 / (1 - 0.95**3)) ** 0.5 + 1e-8)
    assert torch.allclose(weight, torch.tensor(1 - 1e-2 * (step + 0.1)))


@pytest.mark.parametrize(
    "wrong",
    [
        numbers(step=2),
        numbers(lr=1.001e-2),
        numbers(weight_decay=0.11),
        numbers(beta1=0.91),
        numbers(eps=1e-3),
    ],
    ids=["step", "lr", "decay", "beta", "eps"],
)
def test_a_wrong_number_would_be_seen(wrong: AdamNumbers, calls: list[str]) -> None:
    """Each moves the weight by more than the bound of the comparison with FP64."""
    results = []
    for one in (numbers(), wrong):
        memory = [torch.full((70,), value) for value in (2.0, 1.0, 0.5, 0.25)]
        kernels().adam(*([tensor] for tensor in memory), one, torch.tensor(1.0))  # type: ignore[arg-type]
        results.append(memory[1])
    assert ((results[0] - results[1]).abs() > 100 * UNIT).all()


@pytest.mark.parametrize("swapped", [(0, 1), (1, 2), (2, 3)])
def test_an_order_of_lists_that_is_wrong_would_be_seen(
    swapped: tuple[int, int], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = apex_fake.AmpC.multi_tensor_adam_capturable

    def other(
        self: apex_fake.AmpC, chunk: int, flag: Tensor, lists: list[list[Tensor]], *rest: object
    ) -> None:
        order = list(lists)
        order[swapped[0]], order[swapped[1]] = order[swapped[1]], order[swapped[0]]
        real(self, chunk, flag, order, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(apex_fake.AmpC, "multi_tensor_adam_capturable", other)
    runs = [Run(SHAPES, StateFormats(), multi_tensor=kernels()), Run(SHAPES, StateFormats())]
    for run in runs:
        run.step(1)
    ours, theirs = (run.optimizer.states.decoded("a", "exp_avg") for run in runs)
    assert not torch.allclose(ours, theirs, rtol=1e-3)


def test_norms_are_those_of_fp64(calls: list[str]) -> None:
    """Of tensors of both types, and 0 of empty ones, which the kernels would lose a launch for."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in (130, 7, 100_000)]
    tensors += [torch.empty(0), torch.randn(60, generator=generator).bfloat16()]
    got = kernels().norms(tensors)
    exact = torch.stack([tensor.double().norm() for tensor in tensors])
    assert got.dtype == torch.float32 and torch.allclose(got.double(), exact, rtol=2.0**-24, atol=0)
    assert calls == ["multi_tensor_l2norm"] * 2
    assert kernels().norms([torch.empty(0)]).tolist() == [0.0]
    small = kernels()
    small.most_elements = 1000  # type: ignore[misc]
    assert torch.allclose(small.norms(tensors).double(), exact, rtol=1e-6, atol=0)
    tensors[1][3] = torch.inf
    assert kernels().norms(tensors).isfinite().tolist() == [True, False, True, True, True]


def test_a_flag_of_one_call_does_not_reach_another(calls: list[str]) -> None:
    """A norm that is not finite sets its flag; AdamW would do nothing where it is set."""
    made = kernels()
    assert not made.norms([torch.tensor([torch.nan])]).isfinite().any()
    memory = [torch.full((70,), value) for value in (2.0, 1.0, 0.5, 0.25)]
    made.adam(*([tensor] for tensor in memory), numbers(), torch.tensor(1.0))  # type: ignore[arg-type]
    assert (memory[1] != 1.0).all()


def test_buckets_ask_it_for_norms_of_values_alone(calls: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, 50, generator=generator), torch.randn(9, generator=generator)]

    class Reduced(Bucket):
        def __init__(self) -> None:
            self._held, self._norms = HeldValues(parts), kernels().norms

    norms = Reduced().norms(torch.float64)
    assert norms.dtype == torch.float64 and calls == ["multi_tensor_l2norm"]
    assert torch.allclose(norms, torch.stack([part.double().norm() for part in parts]), rtol=2.0**-24)


def test_refusals(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`optimizer`: apex is for CUDA devices, and this is a CPU"):
        choose_multi_tensor(CPU, key="optimizer", wanted="apex")
    assert choose_multi_tensor(torch.device("meta"), key="multi_tensor", wanted="apex") is None
    assert choose_multi_tensor(CPU, key="multi_tensor", wanted="auto") is None
    monkeypatch.delattr(apex_fake.AmpC, "multi_tensor_adam_capturable")
    with pytest.raises(RuntimeError, match="amp_C has no multi_tensor_adam_capturable; build NVIDIA's"):
        kernels()
    assert in_fp32(torch.ones(3)).stored(3) is not None and not calls


def test_parameters_of_many_elements_are_left_out(calls: list[str]) -> None:
    made = kernels()
    made.most_elements = 1000  # type: ignore[misc]
    run = Run(SHAPES, StateFormats(), multi_tensor=made)
    assert "1 parameters by apex's FusedAdam, not 2 with over 1000 elements" in run.optimizer.describe_pass()
