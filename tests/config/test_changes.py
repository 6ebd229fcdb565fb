"""Which differences between a checkpoint's configuration and a run's are free, accepted or refused."""

from __future__ import annotations

from typing import Any

import pytest

from fp8train.config.changes import changes, check_accepted
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config, to_plain
from tests.training.tiny import tiny_config

BASE = ["precision.level=O1"]


def found(overrides: list[str], base: list[str] | None = None) -> dict[str, str]:
    """Kind by key."""
    saved = to_plain(tiny_config(BASE if base is None else base))
    return {change.key: change.kind for change in changes(saved, tiny_config(overrides))}


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("parallel.pp=2", "free"),
        ("parallel.zero=1", "free"),
        ("train.micro_batch_size=2", "free"),
        ("train.activation_checkpointing=full", "free"),
        ("data.prefix=elsewhere", "free"),
        ("run.threads=3", "free"),
        ("kernels.attention=math", "free"),
        ("run.cuda_graphs=true", "free"),
        ("model.init_std=0.5", "free"),
        ("precision.gradient.bucket_mib=1.0", "free"),
        ("precision.gemm.fast_accumulation=false", "free"),
        ("optimizer.lr=0.5", "meaning"),
        ("optimizer.clip_grad_norm=0.5", "meaning"),
        ("schedule.kind=constant", "meaning"),
        ("train.steps=30", "meaning"),
        ("train.global_batch_size=16", "meaning"),
        ("data.mask_end_of_document=true", "meaning"),
        ("run.seed=7", "meaning"),
        ("precision.gradient.fp8.reduce=bf16", "meaning"),
        ("precision.compute=fp32", "meaning"),
        ("model.num_layers=3", "refused"),
        ("model.rope_theta=5.0", "refused"),
        ("parametrization.attention_mult=2.0", "refused"),
        ("data.seq_length=8", "refused"),
    ],
)
def test_kinds(override: str, kind: str) -> None:
    key = override.partition("=")[0]
    assert found([*BASE, override])[key] == kind


def test_what_belongs_to_the_attempt_is_no_change() -> None:
    others = [
        "run.name=x",
        "run.dir=y",
        "checkpoint.interval=5",
        "checkpoint.resume=auto",
        "logging.interval=3",
        "watchdog.step_timeout_s=99",
        "debug.fault_injection=[{kind: exit, step: 1}]",
    ]
    assert found([*BASE, *others]) == {}


def test_the_same_length_in_other_words_is_no_change() -> None:
    tokens = 20 * 8 * 16
    assert found([*BASE, "train.steps=null", f"train.tokens={tokens}"]) == {}
    assert "train.tokens" in found([*BASE, "train.steps=null", f"train.tokens={2 * tokens}"])


def test_a_batch_that_is_part_of_the_model_is_refused() -> None:
    unit = [*BASE, "precision.recipe=umup"]
    assert found([*unit, "train.global_batch_size=16"], unit)["train.global_batch_size"] == "refused"


def test_another_optimizer_is_refused() -> None:
    assert found([*BASE, "optimizer.name=lion"])["optimizer.name"] == "refused"


def test_what_an_older_checkpoint_does_not_know_had_its_default() -> None:
    saved: dict[str, Any] = to_plain(tiny_config(BASE))
    del saved["parametrization"], saved["train"]["consistency_interval"], saved["precision"]["weights"]
    assert changes(saved, tiny_config(BASE)) == []
    changed = changes(saved, tiny_config([*BASE, "train.consistency_interval=7"]))
    assert [str(change) for change in changed] == ["train.consistency_interval: 1000 -> 7"]


@pytest.mark.parametrize(
    ("section", "key", "value", "run"),
    [
        (("schedule",), "min_lr_ratio", 0.5, ["schedule.kind=constant"]),
        (("optimizer",), "eps", 1e-3, ["optimizer.name=lion"]),
        (("precision", "state", "exp_avg"), "granularity", "tensor", []),
        (("precision", "traffic"), "output", "fp8", []),
        (("model",), "rope_theta", 5.0, ["model.family=gpt"]),
    ],
)
def test_what_neither_run_reads_is_no_change(
    section: tuple[str, ...], key: str, value: object, run: list[str]
) -> None:
    """Older versions let it be written, and checkpoints say so."""
    now = tiny_config([*BASE, *run])
    saved = to_plain(now)
    inner = saved
    for name in section:
        inner = inner[name]
    assert inner[key] != value
    inner[key] = value
    assert changes(saved, now) == []


def test_what_one_of_two_runs_reads_is_a_change() -> None:
    saved = to_plain(tiny_config([*BASE, "schedule.kind=cosine", "schedule.min_lr_ratio=0.5"]))
    kinds = {change.key for change in changes(saved, tiny_config([*BASE, "schedule.kind=constant"]))}
    assert kinds == {"schedule.kind", "schedule.min_lr_ratio"}


def test_a_ramp_is_compared() -> None:
    ramp = ["train.batch_size_ramp=[{steps: 2, global_batch_size: 4}]", "parallel.zero=1"]
    assert found([*BASE, *ramp], [*BASE, *ramp]) == {}
    assert found([*BASE, *ramp])["train.batch_size_ramp"] == "meaning"


def error(overrides: list[str]) -> str:
    """What a resume with these settings is told."""
    config: Config = tiny_config([*BASE, *overrides])
    with pytest.raises(ConfigError) as raised:
        check_accepted(changes(to_plain(tiny_config(BASE)), config), config.checkpoint.accept_changes, "C")
    return str(raised.value)


def test_the_error_says_how_to_accept() -> None:
    text = error(["precision.level=O3", "optimizer.lr=0.5"])
    assert "precision.level: O1 -> O3" in text
    assert "optimizer.lr: 0.01 -> 0.5" in text
    assert "'checkpoint.accept_changes=[optimizer.lr, precision]'" in text.replace(
        "precision, optimizer.lr", "optimizer.lr, precision"
    )
    assert len(text.splitlines()) <= 5
    accept = "checkpoint.accept_changes=[optimizer.lr, precision]"
    config = tiny_config([*BASE, "precision.level=O3", "optimizer.lr=0.5", accept])
    check_accepted(changes(to_plain(tiny_config(BASE)), config), config.checkpoint.accept_changes, "C")


def test_accepting_one_change_does_not_accept_another() -> None:
    text = error(["optimizer.lr=0.5", "optimizer.beta1=0.5", "checkpoint.accept_changes=[optimizer.lr]"])
    assert "optimizer.beta1: 0.9 -> 0.5" in text
    assert "0.01 -> 0.5" not in text
    assert "[optimizer.lr, optimizer.beta1]" in text


def test_refused_changes_cannot_be_accepted() -> None:
    text = error(["model.num_layers=3", "checkpoint.accept_changes=[model]"])
    assert "model.num_layers: 2 -> 3" in text


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["checkpoint.accept_changes=[optimiser]"], "optimiser is neither a section nor a key"),
        (["checkpoint.init_from=auto"], "init_from: auto is no checkpoint"),
        (["checkpoint.init_from=a", "checkpoint.resume=b"], "init_from starts a new run"),
        (["checkpoint.init_mode=warm"], r"init_mode.* has no effect: checkpoint\.init_from is null"),
    ],
)
def test_contradictions(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tiny_config(overrides)


def test_where_optimizer_states_rest_is_free() -> None:
    """Bits are the same, so it is no change of the training; disks are DeepSpeed's."""
    assert found([*BASE, "optimizer.offload=cpu"]) == {"optimizer.offload": "free"}
    with pytest.raises(ConfigError, match="nvme keeps states on a disk and is DeepSpeed's"):
        tiny_config(["optimizer.offload=nvme"])
