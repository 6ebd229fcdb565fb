"""Formulas of communication against what the collectives counted, and against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config
from fp8train.step.trainer import Trainer
from tests.training.tiny import batches, tiny_config
from tools.bench.volume_formulas import Flow, most_loaded, rank_steps, volume

ROOT = Path(__file__).parents[2]
SMALL = ("amax", "gradient_fp8_plan_scale", "loss", "norm", "saturated", "saturation")
VOCAB = 200  # padded to 256
FFN = 512


def sizes(family: str) -> dict[str, Any]:
    """Two layers; the rows that tensor parallelism cuts are 256 and 512 long: halves are whole blocks."""
    heads = {"num_heads": 8, "head_dim": 32, **({"num_kv_heads": 4} if family == "llama" else {})}
    model = {"family": family, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": FFN}
    return {"model": {**model, **heads, "vocab_size": VOCAB}}


FP8_WIRE = ["precision.traffic.output=fp8", "train.activation_checkpointing=full"]
# name -> (family, overrides). A step has several micro-batches of sequences of 16 tokens.
TP: dict[str, tuple[str, list[str]]] = {
    "O0": ("llama", []),
    "O0-gpt": ("gpt", []),
    "O3": ("llama", ["precision.level=O3"]),
    "O3-gpt-lossy-recompute": ("gpt", ["precision.level=O3", *FP8_WIRE]),
    "O3-rows": ("llama", ["precision.level=O3", "precision.recipe=rowwise"]),
    "O3-blocks": ("gpt", ["precision.level=O3", "precision.recipe=mxfp8", "data.seq_length=64"]),
    "O2-paper": ("llama", ["precision.level=O2", "precision.profile=paper"]),
}
EXACT = ["precision.level=O2", "precision.gradient.fp8.reduce=exact", "run.threads=1"]
TP["O2-exact"] = ("gpt", EXACT)
ZERO = "parallel.zero=1"
NODES = ["precision.level=O2", "precision.gradient.fp8.node_size=1"]
DP: dict[str, tuple[str, list[str]]] = {
    "O0-zero": ("llama", ["parallel.zero=1"]),
    "O0": ("gpt", []),
    "O2": ("gpt", ["precision.level=O2"]),
    "O2-bf16": ("llama", ["precision.level=O2", "precision.gradient.fp8.reduce=bf16"]),
    "O2-paper": ("llama", ["precision.level=O2", "precision.profile=paper"]),
    "O2-exact": ("llama", [*EXACT, "train.global_batch_size=2"]),
    "O2-exact-accumulated": ("gpt", EXACT),
    "O2-exact-zero": ("llama", [*EXACT, ZERO, "train.global_batch_size=2"]),
    "O2-exact-accumulated-zero": ("gpt", [*EXACT, ZERO]),
    "O2-paper-zero": ("llama", ["precision.level=O2", "precision.profile=paper", ZERO]),
    "O2-nodes-zero": ("gpt", [*NODES, ZERO]),
    "O2-nodes-bf16-zero": ("llama", [*NODES, "precision.gradient.fp8.between_nodes=bf16", ZERO]),
    "O2-nodes-of-one": ("llama", [*NODES, "precision.gradient.fp8.between_nodes=bf16"]),
    "O3": ("llama", ["precision.level=O3"]),
    "O3-compute-weights": ("gpt", ["precision.level=O3", "precision.traffic.weights=compute"]),
}


def config_of(case: tuple[str, list[str]], layout: Layout) -> Config:
    family, overrides = case
    return tiny_config([*overrides, f"parallel.tp={layout.tp}", f"parallel.cp={layout.cp}"], **sizes(family))


def counted(
    group: dist.ProcessGroup,
    rank: int,
    world_size: int,
    cases: dict[str, tuple[str, list[str]]],
    layout: Layout,
) -> dict[str, dict[str, int]]:
    """Runs in the pool: bytes of the second step by collective and purpose, of each case (``exact`` runs its
    first one twice)."""
    processes = joined_processes(torch.device("cpu"), layout)
    found = {}
    for name, case in cases.items():
        config = config_of(case, layout)
        trainer = Trainer(config, processes, vocab_size=VOCAB)
        data = batches(config, processes)
        trainer.step(0, data.batch(0))
        before = trainer.sent_bytes()
        assert trainer.step(1, data.batch(1)).applied
        found[name] = {key: n - before.get(key, 0) for key, n in trainer.sent_bytes().items()}
        found[name] = {key: n for key, n in found[name].items() if n}
    return found


def check(per_rank: list[dict[str, dict[str, int]]], cases: dict[str, Any], layout: Layout, dp: int) -> None:
    for name, case in cases.items():
        (step,) = rank_steps(config_of(case, layout), dp=dp)
        expected = {flow.name: nbytes for flow, nbytes in volume(step).items()}
        assert len(expected) == len(volume(step)), "two axes share a name"
        for found in per_rank:
            sent = {key: n for key, n in found[name].items() if key.partition("/")[2] not in SMALL}
            assert sent.keys() == expected.keys(), name
            for key, nbytes in expected.items():
                assert sent[key] == pytest.approx(nbytes, rel=0.01), f"{name}: {key}"


def test_tensor_parallel_traffic_is_as_computed(gloo_pool) -> None:
    layout = Layout(tp=2)
    check(gloo_pool.run(counted, 2, TP, layout, timeout=300.0), TP, layout, dp=1)


def test_data_parallel_traffic_is_as_computed(gloo_pool) -> None:
    layout = Layout()
    check(gloo_pool.run(counted, 2, DP, layout, timeout=300.0), DP, layout, dp=2)


def preset(name: str, *overrides: str, dp: int = 1) -> list[dict[Flow, float]]:
    config = load_config(ROOT / "configs" / name, overrides).config
    return [volume(step) for step in rank_steps(config, dp=dp)]


def test_gpt_7b_over_eight_tensor_parallel_ranks() -> None:
    """32 layers of width 4096 with 4 matrices; 1024 micro-batches of 2 x 2048 tokens; 50304 rows of
    vocabulary. A rank sends 7/8 of what is moved."""
    moved = 1024 * 4096 * 4096 * 7 // 8  # elements of the states of all micro-batches
    layer = {
        Flow("tp", name): 32 * 2 * moved for name in ("all_to_all/tp_output", "all_gather/tp_grad_output")
    }
    layer |= {Flow("tp", "all_to_all/tp_grad_input"): 32 * 2 * moved}
    layer |= {Flow("tp", "all_gather/tp_input"): 32 * 4 * moved}
    states = {
        f"{kind}/{where}" for kind in ("all_to_all", "all_gather") for where in ("tp_embedding", "tp_head")
    }
    # 65 norms with gain and bias, and the biases of 64 row-parallel matrices: a vector of FP32 each.
    partial = {Flow("tp", "all_reduce/gradient"): 2 * (65 * 2 + 64) * 4096 * 4 * 7 // 8}
    others = {Flow("tp", name): 2 * moved for name in states} | partial
    others |= {Flow("tp", "all_reduce/tp_head"): 2 * 1024 * 4096 * 3 * 4 * 7 // 8}
    (found,) = preset("gpt/7b.yaml", "parallel.tp=8")
    assert found == {flow: 2 * n for flow, n in layer.items()} | others
    # In FP8 gathers take 1 byte, a scattered gradient 129/128; outputs stay in BF16.
    layer_fp8 = {flow: float(n) for flow, n in layer.items()}
    layer_fp8[Flow("tp", "all_to_all/tp_grad_input")] *= 129 / 128
    layer_fp8[Flow("tp", "all_to_all/tp_output")] *= 2
    (found,) = preset("gpt/7b.yaml", "parallel.tp=8", "precision.level=O3")
    assert found == pytest.approx(layer_fp8 | others)


def test_llama3_8b_under_zero() -> None:
    """6,979,321,856 weights in 32 layers (attention 41,943,040, MLP 176,160,768 each); embedding and head
    of 128256 x 4096 and 65 norms are outside the FP8 plan."""
    plan = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    assert plan == 6_979_321_856
    others = 2 * 128256 * 4096 + 65 * 4096
    (found,) = preset("llama/llama3_8b.yaml", "precision.level=O3", dp=64)
    assert found == pytest.approx(
        {
            Flow("dp", "all_to_all/gradient_fp8_plan"): plan * 129 / 128 * 63 / 64,
            Flow("dp", "reduce_scatter/gradient"): others * 4 * 63 / 64,
            Flow("dp", "all_gather/weights_fp8_plan"): plan * 63 / 64,
            Flow("dp", "all_gather/weights"): others * 2 * 63 / 64,
        }
    )
    (found,) = preset("llama/llama3_8b.yaml", dp=64)
    assert found == {Flow("dp", "all_reduce/gradient"): (plan + others) * 4 * 2 * 63 / 64}


def test_context_and_pipeline_traffic_of_llama3_8b_3d() -> None:
    """zbv: rank 0 has the ends of the model, rank 1 the fold; each sends states over one edge, gradients over
    another. 512 micro-batches of 8192 tokens on 2 x 4 ranks, 32 query and 2 x 8 other heads."""
    ranks = preset("3d/llama3_8b.yaml")
    message = 512 * (8192 // 2 // 4) * 4096 * 2
    for found in ranks:
        assert found[Flow("pp", "send/pipeline_states")] == message
        assert found[Flow("pp", "send/pipeline_gradients")] == message
    layers = [found[Flow("cp", "all_to_all/cp_attention")] for found in ranks]
    # There and back twice (2 x 80 heads), and queries, keys and values (48) again: selective recomputation.
    assert sum(layers) == 32 * 512 * (8192 // 2) * (160 + 48) * 128 * 2 / 4 / 2
    assert most_loaded(ranks) == 1, "the head costs rank 0 blocks, and blocks are what sends"


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        rank_steps(load_config(ROOT / "configs/quickstart/llama.yaml").config, dp=1)
