"""Training steps with norms, attention, AdamW and gradient norms of other packages, on fakes that compute in
float64: the losses and weights of our own kernels, within the rounding of the compute type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from fp8train.config.errors import ConfigError
from fp8train.live.describe import describe_precision
from fp8train.models.fused_block import can_fuse
from fp8train.optim.host_states import Offload
from fp8train.step.trainer import Trainer
from tests.fakes import apex_fake, exact_norm, te_layers_fake
from tests.fakes.transformer_engine_fake import install
from tests.optim.late_queues import LateQueues
from tests.training.tiny import VOCAB, alone, batches, tiny_config

STEPS = 3
LLAMA = ["model.head_dim=8", "train.global_batch_size=4", "run.deterministic=true"]
GPT = ["model.family=gpt", "model.num_kv_heads=4", *LLAMA]
QK_NORM = ["model.qk_norm=gain", *LLAMA]
BY = {
    "norm te": ["kernels.norm=te"],
    "norm apex": ["kernels.norm=apex"],
    "attention te": ["kernels.attention=te"],
    "optimizer apex": ["kernels.optimizer=apex"],
    "multi_tensor apex": ["kernels.multi_tensor=apex"],
    "all": ["kernels.norm=te", "kernels.attention=te", "kernels.optimizer=apex", "kernels.multi_tensor=apex"],
}


def anywhere(device: torch.device) -> None:
    """The fakes run on any device."""


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """What the run asks for holds for its process: undone for other tests."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the packages were asked for."""
    recorder = install(monkeypatch, te_layers_fake.norms, te_layers_fake.attention())
    recorder.calls = apex_fake.install(monkeypatch).calls
    return recorder.calls


def trained(overrides: Sequence[str]) -> tuple[list[tuple[float, float]], Trainer]:
    """(loss, gradient norm) of each step."""
    config = tiny_config(overrides)
    trainer = Trainer(config, alone(), vocab_size=VOCAB, runs_on=anywhere)
    data, history = batches(config, alone()), []
    for i in range(STEPS):
        result = trainer.step(i, data.batch(i))
        history.append((float(result.loss), result.grad_norm))
    return history, trainer


def apart(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    """Largest relative difference of a loss or gradient norm."""
    pairs = (pair for steps in zip(ours, theirs, strict=True) for pair in zip(*steps, strict=True))
    return max(abs(one / other - 1) for one, other in pairs)


def assert_follows(got: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    """The first step differs by roundings to BF16 alone; AdamW then turns the sign of a tiny gradient into a
    whole step."""
    assert apart(got[:1], expected[:1]) <= 2.0**-8
    assert apart(got, expected) <= 0.03 and got[-1][0] < got[0][0]


@pytest.mark.parametrize("model", [LLAMA, GPT, QK_NORM], ids=["llama", "gpt", "qk_norm"])
@pytest.mark.parametrize("kernels", BY.values(), ids=BY)
def test_steps_in_bf16(model: list[str], kernels: list[str], calls: list[str]) -> None:
    expected, _ = trained(model)
    assert not calls
    got, trainer = trained([*model, *kernels])
    assert_follows(got, expected)
    assert calls
    header = "\n".join(describe_precision(trainer))
    for setting in kernels:
        name, value = setting.removeprefix("kernels.").split("=")
        if name in ("norm", "attention"):
            assert f"{value} [as the configuration says" in header
    assert not any(key.endswith("_extra_state") for key in trainer.model.state_dict())


@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("name", ["norm te", "norm apex", "optimizer apex", "multi_tensor apex"])
def test_steps_in_fp32(model: list[str], name: str, calls: list[str]) -> None:
    """Where nothing is rounded to BF16, to a few units of FP32."""
    in_fp32 = [*model, "precision.compute=fp32"]
    expected, _ = trained(in_fp32)
    got, _ = trained([*in_fp32, *BY[name]])
    assert calls and apart(got, expected) <= 2e-5


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_steps_with_fp8(level: str, calls: list[str]) -> None:
    """FP8 states and gradients stay with ours; FP32 states and values go to apex. A code that falls on the
    other side of a rounding moves more than a kernel's unit."""
    fp8 = [*LLAMA, f"precision.level={level}"]
    expected, _ = trained(fp8)
    got, trainer = trained([*fp8, *BY["all"]])
    assert apart(got, expected) <= 0.03 and got[-1][0] < got[0][0]
    line = trainer.optimizer.describe_pass()
    assert "parameters by apex's FusedAdam, not" in line and "multi_tensor_l2norm" in calls


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_calls_them_again(recompute: str, calls: list[str]) -> None:
    plain, _ = trained([*LLAMA, *BY["all"]])
    once = len(calls)
    again, _ = trained([*LLAMA, *BY["all"], f"train.activation_checkpointing={recompute}"])
    assert again == plain and len(calls) - once > once


def test_gradients_that_are_released_are_judged_by_its_norms(calls: list[str]) -> None:
    release = [
        *LLAMA,
        "train.gradient_release=true",
        "optimizer.clip_grad_norm=0",
        "train.micro_batch_size=4",
    ]
    expected, _ = trained(release)
    got, trainer = trained([*release, *BY["all"]])
    assert_follows(got, expected)
    assert calls.count("multi_tensor_l2norm") == STEPS * len(trainer.store.buckets)


@pytest.mark.parametrize("level", [[], ["precision.level=O2"]], ids=["O0", "O2"])
def test_states_in_host_memory(level: list[str], calls: list[str]) -> None:
    """The same bits, though states come in pieces, each updated while it is there."""
    overrides = [*LLAMA, *level, "kernels.optimizer=apex"]
    weights = []
    for offload in (None, Offload(LateQueues(), 8192)):
        more = [] if offload is None else ["optimizer.offload=cpu"]
        config = tiny_config([*overrides, *more])
        trainer = Trainer(config, alone(), vocab_size=VOCAB, runs_on=anywhere, offload=offload)
        data = batches(config, alone())
        for i in range(STEPS):
            trainer.step(i, data.batch(i))
        weights.append(trainer.state_tensors())
        assert "parameters by apex's FusedAdam" in trainer.optimizer.describe_pass()
    for name, expected in weights[0].items():
        same = torch.equal(weights[1][name].view(torch.uint8), expected.contiguous().view(torch.uint8))
        assert same, name


def test_saved_inputs_in_fp8(calls: list[str]) -> None:
    saved = [*LLAMA, "precision.level=O1", "precision.activations=fp8"]
    expected, _ = trained(saved)
    got, _ = trained([*saved, *BY["norm apex"]])
    assert calls and apart(got, expected) <= 0.03


@pytest.mark.parametrize("name", ["norm te", "norm apex"])
def test_blocks_are_not_fused(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where our own norms would be one pass with casts."""
    monkeypatch.setattr("fp8train.kernels.fused_op.fuses", lambda x: True)
    model = [*LLAMA, "precision.level=O2"]
    for kernels, fused in ([], True), (BY["attention te"], True), (BY[name], False):
        config = tiny_config([*model, *kernels])
        trainer = Trainer(config, alone(), vocab_size=VOCAB, runs_on=anywhere)
        assert [can_fuse(block) for block in trainer.model.held_blocks()] == [fused] * 2


@pytest.mark.parametrize("name", ["norm te", "norm apex"])
def test_a_wrong_norm_would_be_seen(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward with the standard deviation in the place of its inverse."""
    expected, _ = trained(LLAMA)
    real = exact_norm.backward
    monkeypatch.setattr(exact_norm, "backward", lambda g, x, m, r, w: real(g, x, m, 1 / r, w))
    got, _ = trained([*LLAMA, *BY[name]])
    assert apart(got[:1], expected[:1]) > 2.0**-7


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["kernels.norm=te", "train.compile=block"], "kernels.norm: te: train.compile: block cannot trace"),
        (
            ["kernels.attention=te", "train.compile=block"],
            "kernels.attention: te: train.compile: block cannot",
        ),
        (["kernels.norm=apex", "run.cuda_graphs=true"], "run.cuda_graphs: true was never recorded with"),
        (
            ["kernels.optimizer=apex", "optimizer.name=lion"],
            "optimizer.name: lion is no rule that its FusedAdam",
        ),
        (
            [
                "kernels.multi_tensor=apex",
                "precision.level=O2",
                "precision.gradient.fp8.reduce=exact",
            ],
            "precision.gradient.fp8.reduce: exact has norms from sums of integers",
        ),
        (
            ["kernels.norm=apex", "run.device=cpu"],
            "kernels.norm: apex is for CUDA devices, but run.device is cpu",
        ),
        (["kernels.norm=te", "precision.compute=fp64"], "kernels.norm: te knows no FP64"),
        (["kernels.attention=te", "precision.compute=fp32"], "kernels.attention: te computes in BF16"),
        (["kernels.attention=te", "model.attention_in_fp32=true"], "kernels.attention: te computes in BF16"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as found:
        tiny_config(overrides)
    assert says in str(found.value)
