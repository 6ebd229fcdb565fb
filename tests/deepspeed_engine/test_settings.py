"""The JSON that DeepSpeed is given: made of the configuration, said once, and everything else refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.deepspeed_engine.settings import deepspeed_json, further_settings
from tests.training.tiny import tiny_config

ENGINE = ("engine=deepspeed", "parallel.zero=2")


def config_with(*overrides: str) -> Config:
    return tiny_config([*ENGINE, *overrides])


def test_what_follows_from_the_configuration() -> None:
    config = config_with("precision.compute=bf16", "optimizer.clip_grad_norm=0.5")
    made = deepspeed_json(config, dp=2, micro_batches=3, on_cuda=False)
    train = config.train
    assert made["train_batch_size"] == train.micro_batch_size * 6
    assert made["gradient_accumulation_steps"] == 3
    assert made["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 25 * 2**20 // 4
    assert made["zero_optimization"]["overlap_comm"] is False
    assert "offload_optimizer" not in made["zero_optimization"]


def test_offload() -> None:
    stage = [
        "parallel.zero=3",
        "deepspeed.nvme_path=/nvme",
        "optimizer.offload=nvme",
        "deepspeed.offload_param=cpu",
    ]
    zero = deepspeed_json(config_with(*stage), dp=1, micro_batches=1, on_cuda=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/nvme"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_more_settings_are_laid_over_section_by_section(tmp_path: Path) -> None:
    path = tmp_path / "more.json"
    path.write_text(json.dumps({"zero_optimization": {"sub_group_size": 7}, "wall_clock_breakdown": True}))
    made = deepspeed_json(config_with(f"deepspeed.config={path}"), dp=1, micro_batches=1, on_cuda=False)
    assert made["zero_optimization"]["sub_group_size"] == 7
    assert made["zero_optimization"]["stage"] == 2
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage, which parallel.zero says"),
        ({"train_batch_size": 8}, "train_batch_size, which train.global_batch_size says"),
        ({"optimizer": {"type": "Adam"}}, "optimizer, which the section optimizer says"),
        ({"bf16": {"enabled": True}}, "bf16, which precision.compute says"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device, which optimizer.offload says",
        ),
    ],
)
def test_what_both_define_is_refused_also_if_it_is_equal(
    tmp_path: Path, settings: dict[str, object], told: str
) -> None:
    path = tmp_path / "more.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"more\.json defines ") as caught:
        further_settings(config_with(f"deepspeed.config={path}"))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        (None, "cannot read"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "more.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        further_settings(config_with(f"deepspeed.config={path}"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.zero=none"], "leaves DeepSpeed nothing to do"),
        (["parallel.tp=2"], "only data-parallel ranks are wired to it; write parallel.tp: 1"),
        (["precision.level=O2", "precision.weights=fp8"], "rests weights in FP8, but DeepSpeed writes them"),
        (["precision.level=O2", "precision.state.master.format=fp16_scaled"], "keeps those, in FP32"),
        (
            ["precision.level=O2", "precision.state.exp_avg.granularity=tensor"],
            "flat partitions without tensors",
        ),
        (["precision.level=O1", "parallel.zero=3"], "DeepSpeed's ZeRO-3 reduces gradients itself"),
        (["precision.level=O1", "precision.gradient.fp8.reduce=shared_scale"], "only the exchange of FP8"),
        (
            ["precision.level=O2", "optimizer.offload=cpu", "precision.gradient.format=high_precision"],
            "DeepSpeed's CPU optimizer keeps offloaded states",
        ),
        (["optimizer.offload=nvme"], "is for parallel.zero: 3"),
        (["deepspeed.offload_param=cpu"], "is where ZeRO-3's parameters rest"),
        (["train.gradient_release=true", "optimizer.clip_grad_norm=0"], "DeepSpeed has its own"),
        (["kernels.optimizer=apex"], "DeepSpeed has its own"),
        (["optimizer.name=lion", "optimizer.offload=cpu"], "is not DeepSpeed's CPU optimizer's"),
    ],
)
def test_what_its_engine_owns_is_refused_with_the_reason(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_with(*overrides)
    assert told in " ".join(str(caught.value).split())


@pytest.mark.parametrize("zero", [2, 3])
def test_the_native_engine_has_no_such_stage(zero: int) -> None:
    with pytest.raises(ConfigError, match=f"parallel.zero: {zero} splits"):
        tiny_config([f"parallel.zero={zero}", "train.global_batch_size=8"])


def test_norms_that_run_in_backward_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "more.json"
    path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    zero3 = ["parallel.zero=3", f"deepspeed.config={path}"]
    assert further_settings(config_with(*zero3))
    fp8 = ["precision.gemm.fp8=true", "precision.activations=fp8", "precision.compute=bf16"]
    with pytest.raises(ConfigError, match="cuts norms of"):
        further_settings(config_with(*zero3, *fp8))
