"""Bytes per parameter and the header's words, against what is allocated and what the levels promise."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import joined_processes
from fp8train.live.describe import describe_precision, precision_warnings, stored_bytes
from fp8train.step.trainer import Trainer
from fp8train.update_rules.adamw import AdamWSettings
from tests.training.tiny import VOCAB, alone, tiny_config

SIZES = ["model.hidden_size=128", "model.ffn_hidden_size=256", "train.micro_batch_size=4"]
# FP8-LM section 2: bytes per parameter of gradient, master, first and second moment, without scales.
EXACT = ["precision.gradient.fp8.reduce=exact"]
LEVELS = {"O0": (4, 4, 4, 4), "O1": (1, 2, 4, 4), "O2": (1, 2, 1, 2)}


def trainer_of(*overrides: str) -> Trainer:
    return Trainer(tiny_config([*SIZES, *overrides]), alone(), vocab_size=VOCAB)


@pytest.mark.parametrize("level", LEVELS)
def test_bytes_per_parameter_are_those_of_the_level_and_a_scale_for_128(level: str) -> None:
    trainer = trainer_of(f"precision.level={level}")
    stored = stored_bytes(trainer)
    shares = stored.per_parameter()
    for name, plain in zip(("gradient", "master", "exp_avg", "exp_avg_sq"), LEVELS[level], strict=True):
        scale = 1 / 128 if plain < 4 else 0.0
        assert shares[name] == pytest.approx(plain + scale, abs=1e-6), name
    assert shares["total"] == pytest.approx(sum(LEVELS[level]), rel=0.01)
    if level == "O2":
        assert shares["total"] <= 6.1
    assert shares["compute_copy"] == pytest.approx(2 if level == "O0" else 1, abs=0.01)
    assert shares["accumulator"] == (0 if level == "O0" else 2)
    assert stored.linears.parameters == sum(
        linear.weight.numel() for linear in trainer.model.linears().values()
    )


def test_8_bit_second_moments_fit_the_target() -> None:
    state = "precision.state.exp_avg_sq={format: e4m3, expand: true}"
    assert stored_bytes(trainer_of("precision.level=O2", state)).per_parameter()["total"] <= 5.2


@pytest.mark.parametrize(
    ("plan", "master", "moment"),
    [("coat", 2 + 1 / 128, 1 + 5 / 128), ("e4m3_e5m2", 2.0, 1.0), ("lean", 2 + 1 / 128, 1 + 1 / 128)],
)
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_state_plans_take_what_they_say(level: str, plan: str, master: float, moment: float) -> None:
    """A block's scale takes one byte, an expanded one's five; COAT's own, three FP32 numbers, twelve."""
    trainer = trainer_of(f"precision.level={level}", f"precision.state.plan={plan}", "parallel.zero=none")
    shares = stored_bytes(trainer).per_parameter()
    found = [shares[role] for role in ("master", "exp_avg", "exp_avg_sq")]
    assert found == pytest.approx([master, moment, moment], abs=5e-3)
    assert shares["total"] <= 5.2
    words = {"coat": "exp_avg e4m3 (block, expanded), exp_avg_sq e4m3 (block, expanded)"}
    words["e4m3_e5m2"] = "master fp16_scaled (tensor), exp_avg e4m3 (tensor), exp_avg_sq e5m2 (tensor)"
    words["lean"] = (
        "master fp16_scaled (block, stochastic), exp_avg e4m3 (block), "
        "exp_avg_sq sqrt(e4m3) (block, stochastic)"
    )
    assert words[plan] in "\n".join(describe_precision(trainer))


LEAN = ("precision.level=O2", "precision.state.plan=lean", "train.micro_batch_size=8")


def test_lean_states_all_in() -> None:
    """By hand: FP8 weight 1, gradient 1, master 2, moments 1 each, and a byte for 128 of four of them;
    without the gradient, which need not be kept, the target is 5.1. Each of the eight weights has one FP32
    scale."""
    trainer = trainer_of(*LEAN)
    stored = stored_bytes(trainer)
    plan = stored.plan
    elements = 2 * (128 * (128 + 2 * 64) + 128 * 128 + 128 * 512 + 256 * 128)
    assert plan.parameters == elements
    whole = {"weight": 1, "gradient": 1, "accumulator": 0, "master": 2, "exp_avg": 1, "exp_avg_sq": 1}
    assert plan.values == {name: elements * size for name, size in whole.items()}
    assert plan.scales == {
        "weight": 4 * 8,
        **dict.fromkeys(list(whole)[1:2] + list(whole)[3:], elements // 128),
    }
    assert plan.total / elements == pytest.approx(6 + 4 / 128, abs=1e-3)
    assert (plan.total / elements) - plan.share("gradient") <= 5.1
    line = "all in: 6.031 (weight 1.000, gradient 1.000, master 2.000, exp_avg 1.000, exp_avg_sq 1.000, "
    assert f"{line}scales 0.031) bytes per parameter of the FP8 plan; " in "\n".join(
        describe_precision(trainer)
    )


def test_a_master_in_its_parameter_is_one_memory() -> None:
    """BF16 parameter and 16 bits beside it: 4 bytes, and the FP8 copy of the weight."""
    remainder = "precision.state.master={format: bf16_remainder, rounding: nearest}"
    trainer = trainer_of("precision.level=O2", remainder, "precision.weights=compute")
    plan = stored_bytes(trainer).plan
    assert plan.values["master"] == 2 * plan.parameters
    assert plan.values["weight"] == 2 * plan.parameters  # no step yet, so no copy
    everything = stored_bytes(trainer_of("precision.compute=fp32")).model
    assert everything.values["master"] == 0 and everything.values["weight"] == 4 * everything.parameters


def test_integers_are_not_called_bf16() -> None:
    header = "\n".join(describe_precision(trainer_of("precision.level=O2", "run.threads=1", *EXACT)))
    assert "gradients e4m3 (one scale per tensor) of each micro-batch, added as integers;" in header


def describe_with_owners(group: dist.ProcessGroup, rank: int, world_size: int) -> tuple[str, float]:
    """Runs in the pool: the header, and bytes of a gradient."""
    config = tiny_config([*SIZES, "precision.level=O3", "precision.gradient.fp8.reduce=bf16"])
    trainer = Trainer(config, joined_processes(torch.device("cpu")), vocab_size=VOCAB)
    return "\n".join(describe_precision(trainer)), stored_bytes(trainer).per_parameter()["gradient"]


def test_what_owners_read_wide_is_not_called_fp8(gloo_pool) -> None:
    header, nbytes = gloo_pool.run(describe_with_owners, 2)[0]
    assert nbytes == 2
    assert "gradients accumulated in bf16 and reduced in bf16 to their owners, not cast;" in header


def test_one_micro_batch_needs_no_accumulator() -> None:
    trainer = trainer_of("precision.level=O2", "train.micro_batch_size=8")
    assert stored_bytes(trainer).per_parameter()["accumulator"] == 0


def test_released_gradients_are_said_and_share_memory() -> None:
    settings = ["precision.level=O0", "train.micro_batch_size=8", "optimizer.clip_grad_norm=0"]
    settings += ["model.num_layers=6", "precision.gradient.bucket_mib=0.06"]
    plain, released = (
        trainer_of(*settings, f"train.gradient_release={value}") for value in ("false", "true")
    )
    buckets, kept = len(plain.store.buckets), len(released.store.lasting)
    header = "\n".join(describe_precision(released))
    assert f"gradients released during backward: {buckets} buckets in the memory of {kept}" in header
    assert "released" not in "\n".join(describe_precision(plain))
    assert stored_bytes(plain).per_parameter()["gradient"] == 4
    assert kept < buckets / 3 and stored_bytes(released).per_parameter()["gradient"] < 4 / 3


def test_the_whole_model_is_everything_that_is_allocated() -> None:
    trainer = trainer_of("precision.level=O2")
    states = sum(tensor.nbytes for tensor in trainer.optimizer.states.tensors().values())
    storages = [bucket.storage for bucket in trainer.store.buckets]
    buckets = sum(storage.stored_bytes + storage.accumulator_bytes for storage in storages)
    linears = trainer.model.linears()
    copies = sum(linear.weight_bytes for linear in linears.values())
    inside = {f"{path}.weight" for path in linears}
    others = sum(p.nbytes for fqn, p in trainer.model.named_parameters() if fqn not in inside)
    assert stored_bytes(trainer).model.total == states + buckets + copies + others


def test_the_header_says_what_is_fp8_and_what_is_not() -> None:
    lines = "\n".join(describe_precision(trainer_of("precision.level=O2")))
    for words in (
        "precision: O2, bf16 activations",
        "FP8: 8 of 9 linears; skipped 1 (head: 1)",
        "weights in FP8 only",
        "gradients e4m3 (blocks of up to 128), accumulated in bf16, reduced by exchange",
        "master fp16_scaled (block, stochastic), exp_avg e4m3 (block), exp_avg_sq fp16_scaled (block)",
        "6.03 bytes per parameter of the hidden linears",
        "outside the FP8 plan accumulated in fp32 and reduced in fp32",
    ):
        assert words in lines, lines
    paper = "\n".join(describe_precision(trainer_of("precision.level=O1", "precision.profile=paper")))
    for words in ("one scale per tensor", "reduced by shared_scale", "exp_avg fp32, exp_avg_sq fp32"):
        assert words in paper, paper
    for recipe, words in (
        ("coat_act", "bf16 activations, of norms and non-linearities kept in e4m3 (1x16)"),
        ("nvfp4_simulated", "[NVFP4 simulation: operands rounded to FP4 values"),
    ):
        lines = "\n".join(describe_precision(trainer_of("precision.level=O1", f"precision.recipe={recipe}")))
        assert words in lines, lines
    plain = describe_precision(trainer_of())
    assert "FP8: off" in plain
    assert "attention: torch [CPU: torch's own choice]" in plain
    named = describe_precision(trainer_of("kernels.attention=math"))
    assert "attention: math [as the configuration says]" in named


def test_decay_that_rounding_takes_back_is_said_before_the_run() -> None:
    """FP8-LM's masters at its rate and λ; see ``tests/optim/test_decay_loss.py`` for what is true of it."""
    paper = ("precision.level=O1", "precision.profile=paper", "optimizer.lr=3e-4")
    [line] = precision_warnings(trainer_of(*paper))
    for words in (
        "precision.state.master.rounding is nearest: weight decay removes 3e-05 of a weight",
        "half a unit in the last place of fp16_scaled is 0.00024 to 0.00049 of it",
        "write precision.state.master.rounding: stochastic",
    ):
        assert words in line
    [line] = precision_warnings(trainer_of(*paper[:2], "optimizer.lr=3e-3"))
    assert "0.0003 of a weight" in line and "moves only some weights by itself" in line
    for silent in (
        ("precision.level=O2",),
        (*paper, "precision.state.master.rounding=stochastic"),
        (*paper, "precision.state.master.format=fp32"),
        (*paper, "optimizer.weight_decay=0"),
        (*paper[:2], "optimizer.lr=0.01"),
        (),
    ):
        assert precision_warnings(trainer_of(*silent)) == []


def test_the_papers_numbers_reach_optimizer_and_reduction() -> None:
    level = ("precision.level=O2", "parallel.zero=none")
    ours, theirs = trainer_of(*level), trainer_of(*level, "precision.profile=paper")
    settings = [trainer.optimizer.rule.settings for trainer in (ours, theirs)]
    assert [one.bounded_update for one in settings if isinstance(one, AdamWSettings)] == [True, False]
    assert theirs.gradients.fp8 is not None
    assert theirs.gradients.fp8.mu_initial == "one_over_root_ranks"


def test_print_shows_the_live_recipe_of_every_linear() -> None:
    text = repr(trainer_of("precision.level=O1", "precision.profile=paper").model)
    assert text.count("weight resident in fp8") == 8
    assert text.count("x=e4m3:delayed16max/tensor/pow2 w=e4m3:cur/tensor/pow2") == 8


def test_recipe_and_parametrisation_are_in_the_header() -> None:
    config = tiny_config(["precision.recipe=mus", "precision.level=O1"])
    lines = describe_precision(Trainer(config, alone(), vocab_size=VOCAB))
    assert lines[1] == "parametrization: mus; mean loss times 32768 in backward (divided out of gradients)"
    assert lines[2].endswith("; recipe mus")
