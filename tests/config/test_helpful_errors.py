"""Errors that say everything at once, in a useful order, and end with what to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.config.dump import dump_yaml
from fp8train.config.errors import ConfigError
from fp8train.config.hints import close_match
from fp8train.config.length import beyond_the_end
from fp8train.config.linear_names import linear_paths
from fp8train.config.resolve import load_config, resolve_mapping
from fp8train.config.schema import Config, to_plain
from fp8train.config.world import check_world
from fp8train.models.build import outline
from tests.config.examples import MINIMAL, message_of, minimal, write


def lines_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    return message_of(write(tmp_path, text), *overrides).splitlines()


def overridden(tmp_path: Path, *overrides: str) -> list[str]:
    return lines_of(tmp_path, MINIMAL, *overrides)


def test_a_misspelt_section_is_not_missing_too(tmp_path: Path) -> None:
    assert lines_of(tmp_path, MINIMAL.replace("model:", "modeel:")) == [
        "run.yaml:1: modeel: unknown key; did you mean model?"
    ]


def test_what_stands_in_a_misspelt_section_is_checked(tmp_path: Path) -> None:
    text = MINIMAL.replace("train:", "trian:").replace("steps: 10", "stesp: 10").replace("lr: 3e-4", "lr: x")
    assert lines_of(tmp_path, text) == [
        "run.yaml:10: optimizer.lr: expected a number > 0; got 'x'",
        "run.yaml:11: trian: unknown key; did you mean train?",
        "run.yaml:12: train.stesp: unknown key; did you mean train.steps?",
    ]


def test_a_section_inside_a_section(tmp_path: Path) -> None:
    text = MINIMAL + "precision: {level: O2, gem: {keep_x: 5}}\n"
    assert [line.split(": ")[1] for line in lines_of(tmp_path, text)] == [
        "precision.gem",
        "precision.gemm.keep_x",
    ]


def test_a_section_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    message = lines_of(tmp_path, MINIMAL + "modeel: {family: 3}\n")
    assert message == ["run.yaml:15: modeel: unknown key; did you mean model?"]


def test_what_is_missing_comes_last(tmp_path: Path) -> None:
    text = MINIMAL.replace("  num_layers: 2\n", "").replace("seq_length: 32", "seq_length: long")
    assert [line.split(": ")[1] for line in lines_of(tmp_path, text)] == [
        "data.seq_length",
        "model.num_layers",
    ]


def test_every_problem_is_named_on_five_lines(tmp_path: Path) -> None:
    wrong = [f"optimizer.k{number}=1" for number in range(20)]
    text = MINIMAL.replace("  lr: 3e-4\n", "  beta1: 2\n")
    lines = lines_of(tmp_path, text, *wrong)
    assert lines[0] == "run.yaml:10: optimizer.beta1: expected a number >= 0 and < 1; got 2"
    assert lines[1].startswith("command line: optimizer.k0: unknown key; optimizer has name, lr, ")
    assert lines[4].startswith("... and 18 more problems: optimizer.k3, optimizer.k4, ")
    assert lines[4].endswith(", optimizer.k14, and 6 more")


def test_all_overrides_are_judged(tmp_path: Path) -> None:
    text = MINIMAL.replace("  steps: 10\n", "")
    assert lines_of(tmp_path, text, "modeel.num_layers=3", "train.stesp=4", "run.seed=x") == [
        "command line: modeel.num_layers: unknown key; did you mean model.num_layers?",
        "command line: train.stesp: unknown key; did you mean train.steps?",
        "command line: run.seed: expected a whole number >= 0; got 'x'",
    ]


WHOLE = "command line: train.steps: expected a whole number >= 1, or null; got "
NUMBERS = {
    "1,5": f"{WHOLE}'1,5'; write one number, in digits without separators",
    "1_5": f"{WHOLE}'1_5'; write one number, in digits without separators",
    "1 5": f"{WHOLE}'1 5'; write one number, in digits without separators",
    "1_000": f"{WHOLE}'1_000'; write 1000 without separators",
    "12,345,678": f"{WHOLE}'12,345,678'; write 12345678 without separators",
    "1e3": f"{WHOLE}1000.0; write 1000",
    "1.0": f"{WHOLE}1.0; write 1",
    "1.5": f"{WHOLE}1.5",
    '"1.0"': f"{WHOLE}'1.0'; write 1 without quotes",
    '"15"': f"{WHOLE}'15'; write 15 without quotes",
    "true": f"{WHOLE}true",
    "0x": f"{WHOLE}'0x'",
    "1k": f"{WHOLE}'1k'",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_what_is_no_whole_number(text: str, tmp_path: Path) -> None:
    assert overridden(tmp_path, f"train.steps={text}") == [NUMBERS[text]]


@pytest.mark.parametrize(("text", "value"), [("15", 15), ("+5", 5), ("0x10", 16), ("0o17", 15)])
def test_whole_numbers_of_yaml(text: str, value: int) -> None:
    """Hexadecimal and octal with a prefix are numbers in YAML 1.2 and mean nothing else."""
    assert resolve_mapping(minimal(), [f"train.steps={text}"]).config.train.steps == value


def test_a_decimal_comma(tmp_path: Path) -> None:
    assert overridden(tmp_path, "optimizer.lr=0,003") == [
        "command line: optimizer.lr: expected a number > 0; got '0,003'; write 0.003 with a decimal point"
    ]
    assert overridden(tmp_path, "optimizer.lr=1,234")[0].endswith(
        "; write 1.234 with a decimal point, or 1234"
    )
    assert overridden(tmp_path, "optimizer.lr=1,234,567") == [
        "command line: optimizer.lr: expected a number > 0; got '1,234,567'; write 1234567 without separators"
    ]


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["train.tokens=512"], ["train.steps=null"]),
        (["data.blend=[{prefix: a, weight: 1}]"], ["data.prefix=null"]),
        (["schedule.warmup_steps=2", "schedule.warmup_fraction=0.1"], ["schedule.warmup_fraction=null"]),
    ],
)
def test_the_remedy_can_be_typed(overrides: list[str], remedy: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert remedy[0] in message_of(path, *overrides)
    load_config(path, [*overrides, *remedy])


NO_SUGGESTION = ["optimizer.name=sgd", "optimizer.name=muon", "model.family=mamba", "precision.level=O7",
                 "precision.compute=fp16", "schedule.kind=step", "parallel.ep=2", "model.bla=3",
                 "optimizer.beta3=0.9"]  # fmt: skip


@pytest.mark.parametrize("override", NO_SUGGESTION)
def test_what_is_not_similar_is_not_suggested(override: str, tmp_path: Path) -> None:
    (line,) = overridden(tmp_path, override)
    assert "did you mean" not in line
    assert "expected one of: " in line or " has " in line  # what there is instead


SUGGESTIONS = {
    "optimizer.name=adam": "adamw",
    "schedule.kind=wds": "wsd",
    "schedule.kind=Cosin": "cosine",
    "precision.compute=bfloat16": "bf16",
    "precision.compute=float32": "fp32",
    "precision.level=2": "O2",
    "model.norm=rms_norm": "rmsnorm",
    "optimizer.weigth_decay=1": "optimizer.weight_decay",
    "schedule.warmup_iters=1": "schedule.warmup_steps",
    "modeel.x=3": "model",
}


@pytest.mark.parametrize("override", SUGGESTIONS)
def test_what_is_close_in_spelling_or_meaning_is_suggested(override: str, tmp_path: Path) -> None:
    (line,) = overridden(tmp_path, override)
    assert line.endswith(f"; did you mean {SUGGESTIONS[override]}?")


def test_close_matches() -> None:
    assert close_match("sgd", ["adamw", "lion"], cutoff=0.5) is None
    assert close_match("e4m2", ["e4m3", "e5m2"], cutoff=0.5) is None  # another format, not a typo
    assert close_match("abc", ["acb", "bac"], cutoff=0.9) is None  # either could be meant


HEADS = {**minimal()["model"], "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "vocab_multiple": 2}


def test_all_that_is_against_a_layout_at_once() -> None:
    data = {**minimal(), "model": HEADS, "parallel": {"tp": 4, "pp": 3}}
    data["data"]["seq_length"] = 30
    data["train"]["micro_batch_size"] = 3
    with pytest.raises(ConfigError) as caught:
        resolve_mapping(data)
    lines = sorted(line.split(": ", 2)[2] for line in str(caught.value).splitlines())
    assert lines == [
        "data.seq_length (30) must be a multiple of parallel.tp * parallel.cp = 4: each of these ranks holds "
        "a part of every sequence; nearest: 28 or 32; parallel.tp=1 or 2 fits the rest too",
        "global_batch_size (8) must be a multiple of micro_batch_size (3); nearest legal values: 6 or 9",
        "parallel.pp * stages per rank = 3 * 1 = 3 stages, but model.num_layers is 2 and every stage needs a "
        "block; legal: parallel.pp of 1 to 2",
        "parallel.tp (4) must divide model.num_heads = 6 and model.num_kv_heads = 2 (key/value heads are not "
        "replicated) and model.ffn_hidden_size = 2 units of 128 (rows of gate and up stay together) and "
        "model.vocab_multiple = 2; legal: parallel.tp=1 or 2",
    ]
    for tp in (1, 2):
        data["parallel"] = {"tp": tp}
        data["train"]["micro_batch_size"] = 2
        resolve_mapping(data)


def test_processes_that_tensor_parallelism_does_not_divide() -> None:
    config = resolve_mapping({**minimal(), "model": HEADS}, ["parallel.tp=2"]).config
    with pytest.raises(
        ConfigError, match=r"multiple of 2 processes, for example 2, or write parallel\.tp=1 \("
    ):
        check_world(config, 3)


def test_rules_of_several_sections_speak_together(tmp_path: Path) -> None:
    lines = overridden(tmp_path, "parallel.tp=8", "checkpoint.keep_best=1", "model.max_seq_len=16")
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        "data.seq_length",
        "checkpoint.keep_best",
        "parallel.tp",
    ]


BEYOND = {
    "warm-up": (
        ["schedule.warmup_steps=11"],
        "command line: schedule.warmup_steps, train.steps: schedule.warmup_steps (11) is longer than the run "
        "(10 steps), which would end below its learning rate; write for example schedule.warmup_steps=1 "
        "(train.steps: run.yaml:12)",
    ),
    "decay": (
        ["schedule.kind=wsd", "schedule.warmup_steps=5", "schedule.decay_fraction=0.8"],
        "command line: schedule.decay_fraction, schedule.warmup_steps, train.steps: warm-up (5 steps) and "
        "decay (schedule.decay_fraction: 0.8, 8 steps) are longer than the run (10 steps); shorten one of "
        "them, for example schedule.decay_fraction=0.5 (train.steps: run.yaml:12)",
    ),
    "no room to decay": (
        ["schedule.kind=wsd", "schedule.warmup_steps=10", "schedule.decay_fraction=0.8"],
        "command line: schedule.decay_fraction, schedule.warmup_steps, train.steps: warm-up (10 steps) and "
        "decay (schedule.decay_fraction: 0.8, 8 steps) are longer than the run (10 steps); shorten one of "
        "them, for example schedule.warmup_steps=2 (train.steps: run.yaml:12)",
    ),
    "ramp": (
        ["train.batch_size_ramp=[{steps: 10, global_batch_size: 4}]"],
        "command line: train.batch_size_ramp, train.steps: train.batch_size_ramp takes 10 steps and the run "
        "10, so that it would never reach train.global_batch_size (8); shorten the ramp, or lengthen the run "
        "with train.steps (train.steps: run.yaml:12)",
    ),
    "layers": (
        ["model.num_layers=10000000"],
        "command line: model.num_layers: expected a whole number >= 1 and <= 10000; got 10000000",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_run_ends_before(name: str, tmp_path: Path) -> None:
    overrides, expected = BEYOND[name]
    assert overridden(tmp_path, *overrides) == [expected]


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.warmup_steps=10"],
        ["schedule.kind=wsd", "schedule.warmup_steps=5", "schedule.decay_fraction=0.5"],
        # Shares of 7 steps: 3.5 and 3.5, both rounded up.
        ["schedule.kind=wsd", "schedule.warmup_fraction=0.5", "schedule.decay_fraction=0.5", "train.steps=7"],
        ["train.batch_size_ramp=[{steps: 9, global_batch_size: 4}]"],
    ],
)
def test_what_just_fits(overrides: list[str]) -> None:
    resolve_mapping(minimal(), overrides)


def test_intervals_beyond_the_run_are_told() -> None:
    overrides = ["train.eval_interval=11", "checkpoint.interval=12", "precision.level=O2"]
    config = resolve_mapping(minimal(), overrides).config
    assert beyond_the_end(config) == [
        "checkpoint.interval (12) is beyond the run's 10 steps: a checkpoint at the end only",
        "train.eval_interval (11) is beyond the run's 10 steps: one evaluation, at the end",
        "logging.cast_statistics_interval (50) is beyond the run's 10 steps: casts of step 1 only; "
        "logging.cast_statistics_interval=1 shows more",
    ]
    overrides = ["train.eval_interval=10", "checkpoint.interval=11", "checkpoint.save_at_end=false"]
    config = resolve_mapping(minimal(), overrides).config
    assert beyond_the_end(config) == [
        "checkpoint.interval (11) is beyond the run's 10 steps: no checkpoint at all"
    ]
    assert beyond_the_end(resolve_mapping(minimal(), ["checkpoint.interval=0"]).config) == []


LATE = {
    "precision.state.exp_avg.sqrt=true": "has no effect: it halves the exponents of a second "
    "moment; remove it",
    "precision.state.exp_avg.format=bf16_remainder": "format: bf16_remainder: it "
    "pairs a weight with its missing bits; write fp32, which has the same size, or bf16",
    "precision.state.master.expand=true": "has no effect: precision.state.master.format is fp16_scaled "
    "(preset precision.level=O2); remove it, or write precision.state.master.format=e4m3",
    "precision.gemm.exclude=[layers.9.*]": "precision.gemm.exclude: 'layers.9.*' matches no linear; paths "
    "look like layers.0.attention.qkv, up to layers.1.mlp.down",
    "precision.gemm.first_layers_bf16=2": "precision.gemm.fp8 is true but every linear is excluded; relax "
    "exclude/min_dim/*_layers_bf16 (model.num_layers is 2), or write precision.gemm.fp8=false",
    "precision.gemm.min_dim=1024": "precision.gemm.fp8 is true but every linear is excluded; relax "
    "exclude/min_dim/*_layers_bf16 (model.num_layers is 2), or write precision.gemm.fp8=false",
    "precision.gemm={smooth_swiglu: token, exclude: ['*.down']}": "precision.gemm.smooth_swiglu is about "
    "down projections in FP8, but all of them are left in high precision (precision.gemm.exclude, which "
    "recipe: umup fills; or min_dim); remove one of the two",
    "precision.gemm.exclude=[layers.*]": "precision.gemm.fp8 is true but every linear is excluded; relax "
    "exclude/min_dim/*_layers_bf16 (model.num_layers is 2), or write precision.gemm.fp8=false",
}


@pytest.mark.parametrize("override", LATE)
def test_what_training_would_refuse_is_refused_by_the_config(override: str, tmp_path: Path) -> None:
    (line,) = overridden(tmp_path, "precision.level=O2", override)
    assert line.split(": ", 2)[2] == LATE[override]


def test_hadamard_where_it_is_not_built(tmp_path: Path) -> None:
    nvfp4 = ["precision.level=O2", "precision.recipe=nvfp4_simulated"]
    (line,) = overridden(tmp_path, *nvfp4, "precision.gemm.output.x.hadamard=true")
    assert line.endswith(
        "output.x.hadamard: has no effect: it is built for the operands of grad_weight; remove it"
    )
    (line,) = overridden(tmp_path, *nvfp4, "precision.gemm.grad_weight.x.hadamard=false")
    assert line.endswith("; write the same for both")


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_names_of_linears_are_the_models(family: str) -> None:
    config = resolve_mapping(minimal(), [f"model.family={family}"]).config
    assert linear_paths(2) == list(outline(config, 64).linears())


INERT = {
    "optimizer.eps": (["optimizer.name=lion", "optimizer.eps=1e-3"], "optimizer.name=adamw"),
    "precision.state.exp_avg_sq.format": (
        ["optimizer.name=lion", "precision.level=O2", "precision.state.exp_avg_sq.format=e5m2"],
        "optimizer.name=adamw",
    ),
    "schedule.decay_fraction": (["schedule.decay_fraction=0.4"], "schedule.kind=wsd"),
    "model.rope_theta": (["model.family=gpt", "model.rope_theta=5e5"], "model.positions=rope"),
}


@pytest.mark.parametrize("key", INERT)
def test_what_another_setting_makes_meaningless(key: str, tmp_path: Path) -> None:
    overrides, remedy = INERT[key]
    (line,) = overridden(tmp_path, *overrides)
    assert line.startswith(f"command line: {key}, ")
    assert f" has no effect: {remedy.split('=')[0]} is " in line
    assert f"; remove it, or write {remedy}" in line
    resolve_mapping(minimal(), [*overrides, remedy])
    resolve_mapping(minimal(), [*overrides, f"{key}=null"])


def test_an_inert_setting_of_a_file_can_be_taken_back_as_the_message_says(tmp_path: Path) -> None:
    base = {**minimal(), "schedule": {"kind": "cosine", "decay_fraction": 0.4}}
    with pytest.raises(ConfigError, match=r"schedule\.decay_fraction=null takes back what a file sets"):
        resolve_mapping(base)
    resolve_mapping(base, ["schedule.decay_fraction=null"])


@pytest.mark.parametrize("key", INERT)
def test_a_meaningless_setting_at_its_usual_value_is_taken(key: str, tmp_path: Path) -> None:
    """As in every configuration that was printed in full."""
    resolved = resolve_mapping(minimal(), INERT[key][0][:-1])
    again = write(tmp_path, dump_yaml(resolved.config))
    assert load_config(again).config == resolved.config


def test_a_recorded_configuration_with_a_long_warm_up_is_still_read() -> None:
    """Of a checkpoint, say: the rule is about what is started now."""
    plain = to_plain(resolve_mapping(minimal()).config)
    plain["schedule"]["warmup_steps"] = 11
    assert Config.model_validate(plain).schedule.warmup_steps == 11
