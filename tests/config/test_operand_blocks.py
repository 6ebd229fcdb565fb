"""Layouts that cut operands of GEMMs inside scale blocks are refused, with sizes that would do."""

from __future__ import annotations

from typing import Any

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.operand_blocks import cut_blocks
from tests.training.tiny import VOCAB, tiny_config

MODEL: dict[str, Any] = {
    "family": "gpt",
    "num_layers": 1,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 32,
    "ffn_hidden_size": 512,
    "vocab_size": VOCAB,
}
FP64 = ["precision.compute=fp64", "precision.gemm.fp8=true"]


def config(recipe: str, *overrides: str, **model: Any) -> Any:
    return tiny_config([*FP64, f"precision.recipe={recipe}", *overrides], model={**MODEL, **model})


REFUSED = {
    # recipe, overrides, model: what the message says
    "outputs of query/key/value": (
        ("blockwise", ["parallel.tp=4"], {"head_dim": 64, "num_heads": 4, "num_kv_heads": 4}),
        r"parallel\.tp: model\.num_heads \* model\.head_dim = 256 in 4 parts goes through scale blocks of "
        r"128 "
        r"elements \(precision\.gemm\.output\.x\); legal: parallel\.tp of 1 or 2, or a recipe without blocks",
    ),
    "inputs of attention's output": (
        ("mxfp8", ["parallel.tp=2"], {"head_dim": 8, "num_heads": 4, "num_kv_heads": 4}),
        r"model\.num_heads \* model\.head_dim = 32 in 2 parts .* blocks of 32 .* legal: parallel\.tp of 1,",
    ),
    "tokens over cp": (
        ("mxfp8", ["parallel.cp=2", "data.seq_length=32"], {}),
        r"data\.seq_length and parallel\.cp: data\.seq_length = 32 in 2 parts .* "
        r"\(precision\.gemm\.grad_weight\.grad_output\); legal: a multiple of 64, for example 64",
    ),
    "tokens over tp, as codes": (
        ("mxfp8", ["parallel.tp=2", "data.seq_length=96", "precision.traffic.activations=fp8"], {}),
        r"data\.seq_length and parallel\.tp: data\.seq_length = 96 in 2 parts .*grad_weight\.x\); legal: a "
        r"multiple of 64, for example 64",
    ),
    "inputs over tp, in FP4 blocks": (
        ("nvfp4_simulated", ["parallel.tp=2"], {"head_dim": 6, "num_heads": 4, "num_kv_heads": 4}),
        r"model\.num_heads \* model\.head_dim = 24 in 2 parts .* blocks of 16 .* legal: parallel\.tp of 1,",
    ),
    "tokens over cp, in FP4 blocks": (
        ("nvfp4_simulated", ["parallel.cp=2", "data.seq_length=48"], {}),
        r"data\.seq_length = 48 in 2 parts .* blocks of 16 .* a multiple of 32, for example 32",
    ),
}
ALLOWED = {
    "FP4 blocks": ("nvfp4_simulated", ["parallel.tp=2", "parallel.cp=2", "data.seq_length=64"], {}),
    "one process, whatever the sizes": ("blockwise", ["data.seq_length=24"], {"head_dim": 8}),
    "whole blocks over tp": ("mxfp8", ["parallel.tp=2", "data.seq_length=16"], {}),
    "tokens over tp, gathered before they are cast": ("mxfp8", ["parallel.tp=2", "data.seq_length=96"], {}),
    "tokens over cp": ("mxfp8", ["parallel.cp=2", "data.seq_length=64"], {}),
    "rows have no blocks": ("rowwise", ["parallel.tp=2", "data.seq_length=16"], {"head_dim": 8}),
    "unquantised weight gradients have none along tokens": (
        "mxfp8",
        [
            *("parallel.cp=2", "data.seq_length=16", "precision.gemm.keep_x=bf16"),
            "precision.gemm.grad_weight.fp8=false",
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cut_through_a_block_is_refused(name: str) -> None:
    (recipe, overrides, model), message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        config(recipe, *overrides, **model)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_leaves_blocks_whole_is_allowed(name: str) -> None:
    recipe, overrides, model = ALLOWED[name]
    assert not list(cut_blocks(config(recipe, *overrides, **model)))


def test_the_sizes_that_are_named_do() -> None:
    """Each remedy of the messages above, applied."""
    for mended in (
        config("blockwise", "parallel.tp=2", head_dim=64),
        config("mxfp8", "parallel.cp=2", "data.seq_length=64"),
        config("mxfp8", "parallel.tp=2", "data.seq_length=64", "precision.traffic.activations=fp8"),
    ):
        assert not list(cut_blocks(mended))
