"""What ``kernels.gemm: te`` and ``kernels.quantize: te`` go with, as the file alone shows; ``te_native`` is
in tests/kernels/te/test_native.py, beside what it does."""

from __future__ import annotations

import pytest

from fp8train.config.errors import ConfigError
from tests.training.tiny import tiny_config

WIDE = ["parallel.tp=2", "model.hidden_size=256", "model.head_dim=64", "model.ffn_hidden_size=256"]
QUANTIZE = ["precision.level=O2", "kernels.quantize=te"]


@pytest.mark.parametrize(
    "recipe",
    ["current", "te_current", "te_delayed", "te_delayed_recent", "blockwise", "mxfp8", "cscale", "mus"],
)
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_quantisers_go_with(recipe: str, level: str) -> None:
    config = tiny_config([f"precision.level={level}", f"precision.recipe={recipe}", "kernels.quantize=te"])
    assert config.kernels.quantize == "te"


@pytest.mark.parametrize(
    ("overrides", "keys", "reason"),
    [
        (["precision.recipe=rowwise"], "precision.recipe", "output.x (e4m3:cur/row/pow2) has scales of rows"),
        (["precision.recipe=mse"], "precision.recipe", "has scales of least squared error"),
        (["precision.recipe=fp8_amax"], "precision.recipe", "has a margin of 3"),
        (["precision.recipe=nvfp4_simulated"], "precision.recipe", "its quantiser packs FP4 codes"),
        (["parallel.tp=2"], "parallel.tp", "parallel.tp: 2 shares scales over ranks"),
        (["train.compile=block"], "train.compile", "train.compile: block cannot trace them"),
        (
            ["precision.recipe=te_delayed", "run.cuda_graphs=true"],
            "run.cuda_graphs",
            "run.cuda_graphs: true has no place for a look",
        ),
    ],
    ids=str,
)
def test_quantisers_do_not_go_with(overrides: list[str], keys: str, reason: str) -> None:
    margin = [
        "precision.gemm.grad_input.grad_output.margin=3",
        "precision.gemm.grad_weight.grad_output.margin=3",
    ]
    more = margin if "fp8_amax" in overrides[0] else []
    with pytest.raises(ConfigError) as error:
        tiny_config([*QUANTIZE, *more, *overrides])
    text = str(error.value)
    assert f"{keys}, kernels.quantize: kernels.quantize: te: " in text
    assert reason in text
    assert "or kernels.quantize: auto" in text


def test_casts_of_current_scaling_are_recorded_in_graphs() -> None:
    assert tiny_config([*QUANTIZE, "run.cuda_graphs=true"]).run.cuda_graphs


def test_its_gemm_does_not_go_with_simulated_fp4() -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(["precision.gemm.fp8=true", "kernels.gemm=te", "precision.recipe=nvfp4_simulated"])
    assert "kernels.gemm: te: the simulation of NVFP4 has values in the compute type" in str(error.value)
    assert "te_native has Transformer Engine's own NVFP4" in str(error.value)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("more", [[], WIDE, ["train.compile=block"], ["run.cuda_graphs=true"]])
def test_its_gemm_goes_with_everything_on_top(level: str, more: list[str]) -> None:
    assert tiny_config([f"precision.level={level}", "kernels.gemm=te", *more]).kernels.gemm == "te"
