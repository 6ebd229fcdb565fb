"""``kernels.gemm: te_native``: linears of the fake Transformer Engine in our model, optimizer and store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8train.config.errors import ConfigError
from fp8train.kernels.gemm_choice import GemmBackend, choose_gemm_backend
from fp8train.kernels.te import native
from fp8train.models import build
from fp8train.precision.transformer_engine import NativeRecipe, native_recipe
from fp8train.step.trainer import Trainer
from tests.fakes import te_module_fake
from tests.fakes.transformer_engine_fake import Recorder, install
from tests.training.tiny import VOCAB, alone, batches, tiny_config

ALONE = ["precision.gemm.fp8=true", "precision.compute=fp32", "train.global_batch_size=2"]
NATIVE = [*ALONE, "kernels.gemm=te_native"]
STEPS = 3


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = install(monkeypatch, te_module_fake.fake)
    monkeypatch.setattr(
        build,
        "choose_gemm_backend",
        lambda device, dtype, quant=None, wanted="auto": GemmBackend(
            "te_native" if wanted == "te_native" else "decode", "fake"
        ),
    )
    return made


def trained(*overrides: str) -> tuple[list[float], Trainer]:
    config = tiny_config(overrides)
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    data = batches(config, alone())
    return [float(trainer.step(i, data.batch(i)).loss) for i in range(STEPS)], trainer


@pytest.mark.parametrize("recipe", ["current", "te_current"])
def test_trains_as_our_own_linears_do(recorder: Recorder, recipe: str) -> None:
    """The fake casts with the scales of this recipe, so losses and weights are ours but for sums in another
    order: gradients reach the optimizer, of all micro-batches, and new weights reach the linears."""
    got, trainer = trained(*NATIVE, f"precision.recipe={recipe}")
    assert {
        call["recipe"].fp8_quant_fwd_inp.power_2_scale for call in recorder.arguments if "recipe" in call
    } == {recipe == "current"}
    expected, reference = trained(*ALONE, f"precision.recipe={recipe}")
    assert got == pytest.approx(expected, rel=1e-3)
    assert got[-1] < got[0]
    ours = dict(reference.model.named_parameters())
    theirs = dict(trainer.model.named_parameters())
    assert list(theirs) == list(ours), "names are those of every other run"
    for name, parameter in theirs.items():
        assert (parameter - ours[name]).abs().max() <= 0.02 * ours[name].abs().max() + 2e-3, name


def test_initial_values_and_checkpoints_are_those_of_other_runs(recorder: Recorder) -> None:
    native_, plain = (
        Trainer(tiny_config(overrides), alone(), vocab_size=VOCAB) for overrides in (NATIVE, ALONE)
    )
    ours = plain.model.state_dict()
    for name, value in native_.model.state_dict().items():
        assert torch.equal(value, ours[name]), name


def test_one_autocast_a_micro_batch_and_one_cast_of_a_weight_a_step(recorder: Recorder) -> None:
    _, trainer = trained(*NATIVE)
    linears = len(trainer.model.linears())
    assert recorder.calls.count("autocast") == 2 * STEPS
    firsts = [
        call["first"]
        for name, call in zip(recorder.calls, recorder.arguments, strict=True)
        if name == "Linear"
    ]
    assert firsts == ([True] * linears + [False] * linears) * STEPS
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        trainer.model(tokens, tokens)
    last = recorder.arguments[-linears:]
    assert all(call["first"] and not call["trains"] for call in last), "an evaluation casts for itself"
    assert str(trainer.built.fp8).startswith("FP8: 8 of 9 linears")


@pytest.mark.parametrize(
    "more",
    [
        ["train.global_batch_size=4", "logging.cast_statistics_interval=1"],
        ["train.global_batch_size=1", "train.gradient_release=true", "optimizer.clip_grad_norm=0"],
    ],
    ids=["micro-batches", "released"],
)
def test_gradients_arrive_in_bf16(recorder: Recorder, more: list[str]) -> None:
    fp8 = "precision.gemm.fp8=true"
    got, trainer = trained(fp8, "kernels.gemm=te_native", *more)
    expected, _ = trained(fp8, *more[:1], *more[2:])
    assert got == pytest.approx(expected, rel=1e-2)
    assert trainer.monitors.recorder is None, "nobody sees its casts"


def test_a_weight_that_moved_is_followed(recorder: Recorder) -> None:
    """Others may put a parameter's values elsewhere, as ZeRO does."""
    taken = []
    weight = torch.nn.Parameter(torch.randn(16, 32))
    linear = native.NativeLinear(weight, taken.append)
    x = torch.randn(8, 32, requires_grad=True)
    with native.autocast(native.make_recipe(NativeRecipe("Float8CurrentScaling"))):
        first = linear(x, weight)
        weight.data = 2 * weight.data
        assert torch.equal(linear(x, weight), 2 * first)
        weight.grad = None
        linear(x, weight).sum().backward()
    assert len(taken) == 1 and taken[0].shape == weight.shape
    assert weight.grad is None, "it went to whoever takes it"


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "te_delayed": (
        "DelayedScaling",
        {"fp8_format": "HYBRID", "amax_history_len": 1024, "amax_compute_algo": "max", "margin": 0},
    ),
    "te_delayed_recent": (
        "DelayedScaling",
        {"fp8_format": "HYBRID", "amax_history_len": 1, "amax_compute_algo": "most_recent", "margin": 0},
    ),
    "te_current": ("Float8CurrentScaling", {"fp8_format": "HYBRID", "use_power_2_scales": False}),
    "current": ("Float8CurrentScaling", {"fp8_format": "HYBRID", "use_power_2_scales": True}),
    "blockwise": ("Float8BlockScaling", {"fp8_format": "E4M3", "use_f32_scales": False}),
    "mxfp8": ("MXFP8BlockScaling", {"fp8_format": "E4M3"}),
    "nvfp4_simulated": ("NVFP4BlockScaling", {}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recorder: Recorder, recipe: str) -> None:
    sizes = ["model.hidden_size=64", "model.head_dim=16", "data.seq_length=32"]
    config = tiny_config(
        ["precision.gemm.fp8=true", "kernels.gemm=te_native", f"precision.recipe={recipe}", *sizes]
    )
    quant = config.precision.gemm.value()
    assert quant is not None
    found = native_recipe(quant)
    assert isinstance(found, NativeRecipe), found
    assert (found.name, dict(found.options)) == RECIPES[recipe]
    made = native.make_recipe(found)
    assert type(made).__name__ == found.name
    if "fp8_format" in found.options:
        assert made.options["fp8_format"].name == found.options["fp8_format"]


REFUSED = {
    "precision.level=O1": "precision.gradient.format",
    "precision.level=O2": "precision.gradient.format",
    "precision.weights=fp8": "precision.weights: fp8 rests weights in FP8",
    "precision.gemm.head=fp8": "precision.gemm.head: fp8",
    "parallel.tp=2": "parallel.tp: 2 cuts the model",
    "parallel.pp=2": "parallel.pp: 2",
    "train.activation_checkpointing=full": "train.activation_checkpointing: full",
    "train.compile=block": "train.compile: block",
    "run.cuda_graphs=true": "run.cuda_graphs: true",
    "kernels.quantize=te": "kernels.quantize: te",
    "precision.gemm.fast_accumulation=false": "fast_accumulation: false is not what its Float8Cur",
    "precision.recipe=rowwise": "no scales of row",
    "precision.recipe=cscale": "it has no scales like",
    "precision.recipe=mse": "it has no scales like",
    "precision.recipe=mus": "parametrization.kind: mus",
    "precision.guard.action=report": "precision.guard.action: report",
    "data.seq_length=24": "tokens of a micro-batch must be a multiple of 16, and there are 24",
}


@pytest.mark.parametrize("override", REFUSED)
def test_refused(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config([*NATIVE[:1], "kernels.gemm=te_native", override])
    assert "kernels.gemm: te_native" in str(error.value)
    assert REFUSED[override] in str(error.value)
    assert "kernels.gemm: auto" in str(error.value)


@pytest.mark.parametrize(
    "override", ["optimizer.name=adamw", "precision.state.exp_avg.format=e4m3", "parallel.dp=2"]
)
def test_what_it_can_be_combined_with(override: str) -> None:
    assert tiny_config([*NATIVE, override]).kernels.gemm == "te_native"


@pytest.mark.parametrize(
    ("capability", "recipe", "problem"),
    [
        ((9, 0), "current", None),
        ((9, 0), "blockwise", None),
        (
            (8, 9),
            "blockwise",
            "Float8BlockScaling needs compute capability 9.0 or newer, and this GPU has 8.9",
        ),
        ((9, 0), "mxfp8", "MXFP8BlockScaling needs compute capability 10.0 or newer and below 12.0"),
        ((12, 0), "mxfp8", "and this GPU has 12.0"),
        ((10, 0), "mxfp8", None),
        ((9, 0), "nvfp4_simulated", "NVFP4BlockScaling needs compute capability 10.0"),
        ((10, 0), "nvfp4_simulated", None),
    ],
    ids=str,
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, capability: tuple, recipe: str, problem: str | None
) -> None:
    install(monkeypatch, te_module_fake.fake, capability=capability)
    quant = tiny_config(["precision.gemm.fp8=true", f"precision.recipe={recipe}"]).precision.gemm.value()
    if problem is None:
        chosen = choose_gemm_backend(torch.device("cuda"), torch.bfloat16, quant, "te_native")
        assert chosen.name == "te_native" and "Transformer Engine's own linears" in chosen.reason
    else:
        with pytest.raises(ValueError, match="`gemm`: te_native") as error:
            choose_gemm_backend(torch.device("cuda"), torch.bfloat16, quant, "te_native")
        assert problem in str(error.value)
