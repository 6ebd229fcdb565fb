"""Training steps with ``kernels.gemm: te`` on the fake: what stands on top of products does not notice."""

from __future__ import annotations

import pytest
import torch

from fp8train.kernels.gemm_choice import GemmBackend
from fp8train.models import build
from fp8train.step.trainer import Trainer
from tests.fakes import te_gemm_fake, te_quantizer_fake
from tests.fakes.transformer_engine_fake import install
from tests.training.tiny import VOCAB, alone, batches, tiny_config

STEPS = 3


def trained(*overrides: str) -> tuple[list[float], Trainer]:
    config = tiny_config(["precision.compute=fp32", "train.global_batch_size=2", *overrides])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    data = batches(config, alone())
    return [float(trainer.step(i, data.batch(i)).loss) for i in range(STEPS)], trainer


SETTINGS = {
    "O1": ["precision.level=O1"],
    "O2": ["precision.level=O2"],
    "O3": ["precision.level=O3"],
    "delayed": ["precision.level=O2", "precision.recipe=te_delayed"],
    "FP32 scales": ["precision.level=O1", "precision.recipe=te_current"],
    "alphas": ["precision.level=O1", "precision.recipe=mus"],
    "compiled": ["precision.level=O1", "train.compile=block", "model.num_layers=1"],
    "head": ["precision.level=O1", "precision.gemm.head=fp8"],
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] if name == "compiled" else [])
        for name, settings in SETTINGS.items()
    ],
)
def test_equals_the_decode_backend(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, reference = trained(*settings)
    recorder = install(monkeypatch, te_gemm_fake.fake)
    monkeypatch.setattr(build, "choose_gemm_backend", lambda *args, **kw: GemmBackend("te", "fake"))
    got, trainer = trained(*settings)
    assert got == pytest.approx(expected, rel=2e-3)
    assert got[-1] < got[0]
    assert trainer.built.fp8 is not None
    per_batch = 3 * len(trainer.built.fp8.converted)  # output, grad_input, grad_weight
    if "precision.gemm.head=fp8" not in settings:
        assert len(recorder.calls) == per_batch * 2 * STEPS
    for (name, one), other in zip(
        trainer.model.named_parameters(), reference.model.parameters(), strict=True
    ):
        if torch.isfinite(one).all():  # not of a weight that exists in FP8 alone
            difference = (one - other).abs().max()
            assert difference <= 0.02 * other.abs().max() + 2e-3, name


def test_a_wrong_scale_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison's bound is below what one operand's inverted scale does."""
    expected, _ = trained("precision.level=O1")
    install(monkeypatch, te_gemm_fake.fake)
    monkeypatch.setattr(build, "choose_gemm_backend", lambda *args, **kw: GemmBackend("te", "fake"))
    real = te_gemm_fake.Float8TensorStorage.rowwise
    monkeypatch.setattr(
        te_gemm_fake.Float8TensorStorage, "rowwise", lambda self: (real(self)[0], 1 / real(self)[1])
    )
    got, _ = trained("precision.level=O1")
    assert got != pytest.approx(expected, rel=2e-3)


CASTS = {
    "current": ("precision.recipe=current", "Float8CurrentScalingQuantizer"),
    "FP32 scales": ("precision.recipe=te_current", "Float8CurrentScalingQuantizer"),
    "delayed": ("precision.recipe=te_delayed", "Float8Quantizer"),
    "constant": ("precision.recipe=cscale", "Float8Quantizer"),
    "blocks": ("precision.recipe=blockwise", "Float8BlockQuantizer"),
    "MX": ("precision.recipe=mxfp8", "MXFP8Quantizer"),
}
SIZES = ["model.hidden_size=128", "model.head_dim=32", "model.ffn_hidden_size=128", "data.seq_length=128"]


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("casts", CASTS.values(), ids=CASTS)
def test_its_casts_change_no_bit(casts: tuple[str, str], level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and weights are ours, with our own products below."""
    recipe, name = casts
    settings = [recipe, f"precision.level={level}", "train.micro_batch_size=1", "model.num_layers=1", *SIZES]
    expected, reference = trained(*settings)
    blackwell = "mxfp8" in recipe
    recorder = install(
        monkeypatch,
        te_gemm_fake.fake,
        te_quantizer_fake.fake,
        capability=(10, 0) if blackwell else (9, 0),
    )
    got, trainer = trained(*settings, "kernels.quantize=te")
    assert set(recorder.calls) == {name}
    assert got == expected
    for one, other in zip(trainer.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_casts_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once: operands that its quantisers laid out are those that its GEMM reads."""
    for capability, recipe in (((9, 0), "current"), ((10, 0), "mxfp8"), ((9, 0), "blockwise")):
        settings = ["precision.level=O1", f"precision.recipe={recipe}", "model.num_layers=1", *SIZES]
        expected, _ = trained(*settings)
        with monkeypatch.context() as patch:
            recorder = install(patch, te_gemm_fake.fake, te_quantizer_fake.fake, capability=capability)
            patch.setattr(build, "choose_gemm_backend", lambda *args, **kw: GemmBackend("te", "fake"))
            got, _ = trained(*settings, "kernels.quantize=te")
        assert got == pytest.approx(expected, rel=2e-3)
        assert "general_gemm" in recorder.calls and len(set(recorder.calls)) == 2
