"""A checkpoint runs as it was trained, to the bit, every weight quantised once; or in BF16 throughout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fp8train.checkpoint.save import save_checkpoint
from fp8train.config.schema import Config, to_plain
from fp8train.inference.errors import InferenceError
from fp8train.inference.generate import generate
from fp8train.inference.load import TrainedRun, open_run
from fp8train.inference.sampling import Sampling
from fp8train.kernels import fused_op
from fp8train.layers import fp8_weight
from fp8train.models.build import BuiltModel, build_model
from fp8train.models.decoder import Decoder
from fp8train.step.targets import inputs_and_targets
from fp8train.step.trainer import Trainer
from tests.inference.recipes import IN_CI, MARKED, RECIPES, STATIC
from tests.training.tiny import VOCAB, alone, batches, losses, tiny_config

CPU = torch.device("cpu")
FP8 = "precision.gemm.fp8=true"
BACKWARD = ("precision.gemm.grad_weight.x", "precision.gemm.grad_input.w")
DIFFERENT_BACKWARD = tuple(f"{operand}.margin=1" for operand in BACKWARD)
DIFFERENT_CONSTANTS = tuple(f"{operand}.constant_exponent=1" for operand in BACKWARD)
DIFFERENT_BY_RECIPE: dict[str, tuple[str, ...]] = {  # margins mean nothing to them
    **dict.fromkeys((*STATIC, "cscale"), DIFFERENT_CONSTANTS),
    "mse": tuple(f"{operand}.scale_source=current" for operand in BACKWARD),
    "rowwise_gw_hp": DIFFERENT_BACKWARD[1:],  # its weight gradients take what is unquantised
    "nvfp4_simulated": (f"{BACKWARD[0]}.rounding=stochastic", f"{BACKWARD[1]}.granularity=nv_1x16"),
}
PLANS: dict[str, tuple[str, ...]] = {
    "FP8 GEMMs": (FP8,),
    "O1": ("precision.level=O1",),
    "O3": ("precision.level=O3",),
    "fp32": (FP8, "precision.compute=fp32"),
    "gpt": (FP8, "model.family=gpt"),
    "second copy": (
        *(FP8, "precision.gemm.keep_w=second_copy", "precision.gemm.keep_x=second_copy"),
        *DIFFERENT_BACKWARD,
    ),
    "keeps bf16": (FP8, "precision.gemm.keep_w=bf16", "precision.gemm.keep_x=bf16", *DIFFERENT_BACKWARD),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def save(trainer: Trainer, run: Path, step: int = 4) -> TrainedRun:
    """The checkpoint that the training loop writes, opened."""
    save_checkpoint(
        run / "checkpoints",
        step,
        trainer.checkpoint_tensors(),
        meta={"config": to_plain(trainer.config), "vocab_size": VOCAB, "tokenizer": None},
        rank_state={"rng": torch.arange(4)},
        group=None,
        keep_last=1,
    )
    return open_run(run)


def trained(folder: Path, *overrides: str, steps: int = 4) -> tuple[Trainer, TrainedRun]:
    config = tiny_config(["optimizer.lr=0.03", *overrides])
    trainer = losses(config, alone(), steps)[1]
    return trainer, save(trainer, folder, steps)


def loss(model: Decoder, config: Config) -> float:
    """Nats of some sequences that training has not seen."""
    tokens = batches(config, alone()).batch(77)
    inputs, targets = inputs_and_targets(tokens, None)
    with torch.no_grad():
        return float(sum(model(x, y).double() for x, y in zip(inputs, targets, strict=True)))


def trainers_loss(trainer: Trainer) -> float:
    return float(trainer.summed_loss(*inputs_and_targets(batches(trainer.config, alone()).batch(77), None)))


def check_codes(trainer: Trainer, built: BuiltModel) -> None:
    loaded = built.model.linears()
    for path, linear in trainer.model.linears().items():
        if linear.plan is None:
            assert torch.equal(loaded[path].weight, linear.weight), path
            continue
        linear.quantize_weight()
        assert torch.equal(
            loaded[path].fp8_codes().view(torch.uint8), linear.fp8_codes().view(torch.uint8)
        ), path
        assert torch.equal(loaded[path].fp8_scale_inv(), linear.fp8_scale_inv()), path


USUAL = [*((recipe, "O1") for recipe in IN_CI), *(("te_delayed", plan) for plan in PLANS if plan != "O1")]
ALL = [(recipe, plan) for plan in PLANS for recipe in RECIPES]


def plan_with(recipe: str, plan: str) -> tuple[str, ...]:
    """``PLANS[plan]`` as far as ``recipe`` has such a thing."""
    overrides = PLANS[plan]
    if set(DIFFERENT_BACKWARD) <= set(overrides):
        usual = tuple(override for override in overrides if override not in DIFFERENT_BACKWARD)
        overrides = (*usual, *DIFFERENT_BY_RECIPE.get(recipe, DIFFERENT_BACKWARD))
    if recipe == "rowwise_gw_hp":
        overrides = tuple(override for override in overrides if "keep_x" not in override)
    return overrides


@pytest.mark.parametrize(
    ("recipe", "plan"), [*USUAL, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in USUAL)]
)
def test_matched_has_the_codes_and_the_loss_of_training(tmp_path: Path, recipe: str, plan: str) -> None:
    trainer, run = trained(tmp_path, *plan_with(recipe, plan), *RECIPES[recipe])
    built = run.load("matched", device=CPU)
    check_codes(trainer, built)
    assert loss(built.model, run.config) == trainers_loss(trainer)
    assert built.fp8 is not None and len(built.fp8.converted) == (4 if recipe == "umup" else 8)
    if trainer.scales is not None:  # the scales of other steps would give other codes
        trainer.scales.scales.mul_(2.0**-6)
        assert loss(built.model, run.config) != trainers_loss(trainer)


@pytest.mark.parametrize("numerics", ["matched", "bf16"])
def test_fused_blocks_have_the_loss_of_layers(tmp_path: Path, numerics: str) -> None:
    """As on a GPU, whose blocks are fused functions; a loaded weight has no operand for backward."""
    trainer, run = trained(tmp_path, "precision.level=O2")
    model = run.load(numerics, device=CPU).model
    one_by_one = loss(model, trainer.config)
    with patch.object(fused_op, "fuses", lambda x: True):
        assert loss(model, trainer.config) == one_by_one


def test_a_weight_that_takes_the_size_of_its_channels_is_cast_with_them(tmp_path: Path) -> None:
    trainer, run = trained(tmp_path, FP8, "precision.gemm.smooth_swiglu=channel")
    model = run.load("matched", device=CPU).model
    assert all(block.mlp.down.casts_in_forward for block in model.held_blocks())
    assert loss(model, run.config) == trainers_loss(trainer)


def test_a_partial_plan_is_kept(tmp_path: Path) -> None:
    overrides = (FP8, "precision.gemm.exclude=[layers.0.*, '*.down']")
    trainer, run = trained(tmp_path, *overrides)
    built = run.load("matched", device=CPU)
    assert built.fp8 is not None and len(built.fp8.converted) == 3
    assert loss(built.model, run.config) == trainers_loss(trainer)
    kept = built.model.linears()["layers.1.mlp.down"]
    assert torch.equal(kept.weight, trainer.model.linears()["layers.1.mlp.down"].weight)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_an_fp8_head_is_that_of_training(tmp_path: Path, tied: str) -> None:
    """Bit for bit; in BF16 numerics it is none."""
    head = ("precision.level=O2", "precision.gemm.head=fp8", f"model.tie_embeddings={tied}")
    trainer, run = trained(tmp_path, *head)
    matched = run.load("matched", device=CPU)
    assert run.describe("matched", matched).startswith("FP8: 9 of 9 linears; scales")
    assert loss(matched.model, run.config) == trainers_loss(trainer)
    assert run.load("bf16", device=CPU).model.fp8_head is None
    sampling, generator = Sampling(temperature=0.0), torch.Generator()
    generate(matched.model, [1, 2, 3], max_tokens=4, sampling=sampling, generator=generator, eod_id=None)
    assert loss(matched.model, run.config) == trainers_loss(trainer)  # with its codes decoded
    assert matched.model.fp8_head is not None
    codes = matched.model.fp8_head.weight(matched.model.head_weight).rows[0]
    assert codes.dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("plan", PLANS)
def test_weights_take_a_byte_and_are_quantised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    cast, sizes = fp8_weight.cast, []

    def counting(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        sizes.append(x.numel())
        return cast(x, *args, **kwargs)  # type: ignore[arg-type]

    _, run = trained(tmp_path, *PLANS[plan])
    monkeypatch.setattr(fp8_weight, "cast", counting)
    quantise: Callable[..., object] = fp8_weight.quantize_operand
    monkeypatch.setattr(
        fp8_weight, "quantize_operand", lambda x, *a, **k: (sizes.append(x.numel()), quantise(x, *a, **k))[1]
    )
    model = run.load("matched", device=CPU).model
    linears = model.linears().values()
    stored = sum(linear.weight_bytes for linear in linears)
    for _ in range(2):
        loss(model, run.config)
        generate(
            model,
            [1, 2, 3],
            max_tokens=4,
            sampling=Sampling(temperature=0.0),
            generator=torch.Generator(),
            eod_id=None,
        )
    assert sizes == [linear.in_features * linear.out_features for linear in linears]
    assert stored == sum(sizes) + 4 * len(linears)  # and the scales
    for linear in linears:
        assert linear.weight.untyped_storage().nbytes() == linear.weight.element_size()  # one NaN


SOURCES = {**PLANS, "bf16": (), "fp64": ("precision.compute=fp64",)}


@pytest.mark.parametrize("source", SOURCES)
def test_bf16_is_the_masters_rounded_and_no_fp8(tmp_path: Path, source: str) -> None:
    trainer, run = trained(tmp_path, *SOURCES[source])
    built = run.load("bf16", device=CPU)
    assert built.fp8 is None and all(linear.plan is None for linear in built.model.linears().values())
    family = [override for override in SOURCES[source] if override.startswith("model.")]
    plain = build_model(tiny_config(family), vocab_size=VOCAB, device=CPU).model
    with torch.no_grad():
        for fqn, parameter in plain.named_parameters():
            parameter.copy_(trainer.optimizer.states.master(fqn))
            assert torch.equal(dict(built.model.named_parameters())[fqn], parameter)
    assert loss(built.model, run.config) == loss(plain, run.config)


def test_a_run_without_fp8_matches_its_compute_type(tmp_path: Path) -> None:
    trainer, run = trained(tmp_path, "precision.compute=fp32")
    built = run.load("matched", device=CPU)
    assert loss(built.model, run.config) == trainers_loss(trainer)
    assert run.describe("matched", built) == "fp32 operands; trained without FP8 in fp32"
    assert run.describe("bf16", built) == "bf16 operands; trained without FP8 in fp32"


INDEPENDENT = (
    *("te_delayed", "te_delayed_recent", "paper", "cscale", *STATIC),  # the tensor does not choose its scale
    *("rowwise", "rowwise_gw_hp", "blockwise", "mxfp8"),  # or a token's values choose its own
)


def logits_in_pieces(model: Decoder, tokens: Tensor, lengths: list[int]) -> Tensor:
    """[B, S, V] of a sequence that comes in pieces."""
    caches = model.make_caches(len(tokens), tokens.shape[1])
    with torch.no_grad():
        return torch.cat([model.logits(part, caches) for part in tokens.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("recipe", MARKED)
def test_pieces_and_neighbours_matter_to_current_scales_only(tmp_path: Path, recipe: str) -> None:
    """In FP64, so that only the scales can tell; one-token pieces included."""
    overrides = (FP8, "precision.compute=fp64", *RECIPES[recipe])
    _, run = trained(tmp_path, *overrides)
    model = run.load("matched", device=CPU).model
    tokens = batches(run.config, alone()).batch(5)[:, 0, :12]
    with torch.no_grad():
        whole, first = model.logits(tokens), model.logits(tokens[:1])
    spread = float(whole.std())
    errors = [float((first - whole[:1]).abs().max()) / spread]
    for pieces in ([1] * 12, [5, 1, 6]):
        errors.append(float((logits_in_pieces(model, tokens, pieces) - whole).abs().max()) / spread)
    if recipe in INDEPENDENT:
        assert max(errors) < 1e-12
    elif run.config.precision.gemm.output.x.power_of_two:  # codes move where they are subnormal
        assert 1e-7 < max(errors) < 1e-3, errors
    else:
        assert min(errors) > 1e-3 and max(errors) < (1.0 if recipe == "nvfp4_simulated" else 0.3), errors


@pytest.mark.parametrize("recipe", MARKED)
def test_one_token_prompts_generate(tmp_path: Path, recipe: str) -> None:
    _, run = trained(tmp_path, FP8, "train.steps=40", *RECIPES[recipe], steps=40)
    model = run.load("matched", device=CPU).model
    for samples in (1, 3):
        tokens = generate(
            model,
            [7],
            max_tokens=12,
            sampling=Sampling(temperature=0.0),
            generator=torch.Generator(),
            eod_id=None,
            num_samples=samples,
        )
        assert all(row == tokens[0] and len(row) == 12 for row in tokens)
        pairs = zip([7, *tokens[0]], tokens[0], strict=False)
        assert sum((b - 5 * a - 3) % VOCAB in (0, 1) for a, b in pairs) >= 11, tokens  # what it has learnt


def test_one_token_has_its_own_amax(tmp_path: Path) -> None:
    """A linear's output for one token equals the float64 product of what torch's own casts give."""
    _, run = trained(tmp_path, FP8, "precision.compute=fp64")
    linear = run.load("matched", device=CPU).model.linears()["layers.0.mlp.up"]
    x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scale = 2.0 ** torch.floor(torch.log2(448 / x.abs().max()))
    rounded = (x * scale).float().to(torch.float8_e4m3fn).double() / scale
    weight = linear.dequantized_weight(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), rounded @ weight.t(), rtol=1e-13, atol=1e-13)


def test_bf16_needs_no_fp8_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("FP8 GEMMs need compute capability 8.9 or newer")

    _, run = trained(tmp_path, "precision.level=O1")
    monkeypatch.setattr("fp8train.models.build.choose_gemm_backend", refuse)
    with pytest.raises(InferenceError, match=r"step_00000004: .* need .* 8\.9 .*; or use --numerics bf16"):
        run.load("matched", device=CPU)
    assert loss(run.load("bf16", device=CPU).model, run.config) > 0


@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_generation_decodes_each_weight_once(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And draws the tokens of weights that every product decodes."""
    _, run = trained(tmp_path, FP8, *RECIPES[recipe])
    decoded: list[int] = []
    plain = fp8_weight.decode_finite
    monkeypatch.setattr(fp8_weight, "decode_finite", lambda *given: decoded.append(1) or plain(*given))

    def tokens(model: Decoder) -> list[list[int]]:
        settings: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "eod_id": None}
        return generate(model, [1, 2, 3], max_tokens=12, generator=torch.Generator(), **settings)

    model = run.load("matched", device=CPU).model
    before = loss(model, run.config)
    once = tokens(model)
    linears = [linear for linear in model.linears().values() if linear.plan is not None]
    assert len(decoded) == len(linears) == 8
    assert tokens(model) == once
    assert len(decoded) == 8
    assert loss(model, run.config) == before
    monkeypatch.setattr(fp8_weight.LoadedFp8Weight, "decode", lambda self: None)
    assert tokens(run.load("matched", device=CPU).model) == once
