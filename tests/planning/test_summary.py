"""What ``config --summary`` says, against built models and trainers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config
from fp8train.config.world import check_world
from fp8train.kernels import fused_op
from fp8train.layers import fp8_weight
from fp8train.live.describe import stored_bytes
from fp8train.live.stored_bytes import StoredBytes
from fp8train.models.build import outline
from fp8train.models.shapes import parameter_shapes
from fp8train.optim.copy_queues import CopiesAtOnce
from fp8train.optim.host_states import Offload
from fp8train.planning import rank_bytes
from fp8train.planning.rank_bytes import RankBytes
from fp8train.planning.summary import summarise
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches, tiny_config

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart/llama.yaml"
SMALL = ["model.vocab_size=4096", "data.prefix=none"]

MODELS: dict[str, list[str]] = {
    "llama": [],
    "gpt": ["model.family=gpt", "model.num_kv_heads=4"],
    "tied": ["model.tie_embeddings=true"],
    "multi-query": ["model.num_kv_heads=1", "model.head_dim=24"],
    "biases beside RMSNorm": ["model.bias=true"],
    "LayerNorm without bias": ["model.family=gpt", "model.bias=false"],
    "learned norms of heads": ["model.qk_norm=gain"],
    "frozen norms of heads": ["model.qk_norm=frozen"],
    "mus": ["precision.recipe=mus", "precision.level=O2"],
    "umup, whose norms have no gain": ["precision.recipe=umup", "precision.level=O2"],
    "padded vocabulary": ["model.vocab_size=67", "model.vocab_multiple=50"],
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_model(name: str) -> None:
    config = tiny_config(MODELS[name])
    model = outline(config, VOCAB)
    built = [(fqn, tuple(parameter.shape)) for fqn, parameter in model.named_parameters()]
    assert list(parameter_shapes(config.model, VOCAB).items()) == built


@pytest.mark.parametrize("file", ["llama/llama3_70b", "llama/llama2_7b", "gpt/175b", "3d/gpt_7b"])
def test_shapes_of_large_models(file: str) -> None:
    config = load_config(ROOT / f"configs/{file}.yaml").config
    vocabulary = config.model.vocab_size
    assert vocabulary is not None
    model = outline(config, vocabulary)
    built = {fqn: tuple(parameter.shape) for fqn, parameter in model.named_parameters()}
    assert parameter_shapes(config.model, vocabulary) == built


def planned(config: Config, world: int = 1) -> StoredBytes:
    dp, micro_batches = check_world(config, world)
    return RankBytes(config, VOCAB, dp=dp, micro_batches=micro_batches).largest()


FP8 = "precision.level=O2"
EXPANDED = "precision.state.exp_avg_sq={format: e4m3, expand: true}"
RELEASED = [
    *("train.gradient_release=true", "optimizer.clip_grad_norm=0", "model.num_layers=5"),
    "precision.gradient.bucket_mib=0.004",
]
# A run stores these; the sizes are no multiples of 16, nor of a block.
RUNS: dict[str, list[str]] = {
    **{level: [f"precision.level={level}"] for level in ("O0", "O1", "O2", "O3")},
    "one micro-batch": [FP8, "train.micro_batch_size=8"],
    "odd sizes": [FP8, "model.hidden_size=136", "model.ffn_hidden_size=312", "model.num_heads=4"],
    "paper": [FP8, "precision.profile=paper"],
    "coat": [FP8, "precision.state.plan=coat"],
    "8-bit second moments": [FP8, EXPANDED],
    "lean": [FP8, "precision.state.plan=lean", "train.micro_batch_size=8"],
    "remainder": [FP8, "precision.state.master={format: bf16_remainder, rounding: nearest}"],
    "remainder of a parameter": [
        *(FP8, "precision.state.master={format: bf16_remainder, rounding: nearest}"),
        "precision.weights=compute",
    ],
    "lion": [FP8, "optimizer.name=lion"],
    "error feedback": [FP8, "precision.gradient.fp8.error_feedback=true"],
    "reduced in BF16": [FP8, "precision.gradient.fp8.reduce=bf16"],
    **{
        f"released, {' and '.join(over) or 'O0'}": [*over, *RELEASED, "train.micro_batch_size=8"]
        for over in (
            [],
            [FP8],
            [FP8, "precision.profile=paper"],
            [FP8, "precision.gradient.fp8.reduce=bf16", "model.hidden_size=136", "model.ffn_hidden_size=312"],
        )
    },
    "exact": [FP8, "precision.gradient.fp8.reduce=exact", "run.threads=1"],
    "FP8 head": [FP8, "precision.gemm.head=fp8"],
    "FP8 head, tied": [FP8, "precision.gemm.head=fp8", "model.tie_embeddings=true", "model.hidden_size=40"],
    "FP64": ["precision.compute=fp64"],
    "FP32": ["precision.compute=fp32"],
    "FP8 GEMMs alone": ["precision.gemm.fp8=true"],
    "some linears": [FP8, "precision.gemm.exclude=['*.down']", "precision.gemm.first_layers_bf16=1"],
    "smooth": [FP8, "precision.gemm.smooth_swiglu=channel", "precision.weights=compute"],
    **{
        recipe: [FP8, f"precision.recipe={recipe}", "model.hidden_size=128", "model.ffn_hidden_size=384"]
        for recipe in ("te_delayed", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8", "nvfp4_simulated")
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_bytes_are_those_of_a_run(name: str) -> None:
    """After a step, when every copy of a weight has been made."""
    config = tiny_config(RUNS[name])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    trainer.step(0, batches(config, alone()).batch(0))
    assert planned(config) == stored_bytes(trainer)


OFFLOADED = ("O0", "coat", "remainder of a parameter", "lion", "FP32", "FP64", "some linears")


@pytest.mark.parametrize(
    ("name", "slot_bytes"),
    [*((name, 1 << 14) for name in OFFLOADED), ("odd sizes", 1 << 18), ("O2", 1 << 27)],
)
def test_states_in_host_memory_are_counted(
    name: str, slot_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the slots that they visit on the device, exactly."""
    monkeypatch.setattr(rank_bytes, "SLOT_BYTES", slot_bytes)
    config = tiny_config([*RUNS[name], "optimizer.offload=cpu"])
    offload = Offload(CopiesAtOnce(torch.device("cpu")), slot_bytes)
    trainer = Trainer(config, alone(), vocab_size=VOCAB, offload=offload)
    trainer.step(0, batches(config, alone()).batch(0))
    stored = stored_bytes(trainer)
    assert planned(config) == stored
    on_device = planned(tiny_config(RUNS[name]))
    assert stored.model.total == on_device.model.total and on_device.model.on_host == on_device.slots == 0
    states = trainer.optimizer.states
    copied = sum(copy.host.nbytes for load in states._host._loads for copy in load.copies)  # type: ignore[union-attr]
    assert stored.model.on_host == copied
    assert (slot_bytes > stored.slots) == (slot_bytes == 1 << 27)


def test_where_states_are_is_said() -> None:
    """At O2 master, moments and their scales: 2 + 1 + 2 bytes, and three for 128 elements."""
    overrides = [*SMALL, "precision.level=O2", "optimizer.offload=cpu"]
    lines = dict(
        line.split(maxsplit=1) for line in summarise(load_config(QUICKSTART, overrides), None).splitlines()
    )
    assert re.search(r" in host memory, .* on the device with .* of slots", lines["bytes"])
    assert re.search(r"; 5\.\d+ of it in host memory\) bytes per parameter of the FP8 plan", lines["all"])


def weight_bytes(trainer: Trainer) -> int:
    linears = stored_bytes(trainer).linears
    return linears.values["weight"] + linears.scales["weight"]


@pytest.mark.parametrize(
    "name", ["O0", "O2", "odd sizes", "FP8 GEMMs alone", "smooth", "rowwise", "blockwise"]
)
def test_transposed_weights_are_those_of_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Copies for backward whose memory is not the forward operand's, nor a second copy that is stored."""
    for module in (fused_op, fp8_weight):
        monkeypatch.setattr(module, "fuses", lambda x: True)
    config = tiny_config(RUNS[name])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    before = weight_bytes(trainer)
    trainer.model.prepare()
    weights = [linear._fp8_weight for linear in trainer.model.linears().values()]
    operands = [weight.backward_operand() for weight in weights if weight is not None]
    turned = sum(codes.nbytes for codes, _ in filter(None, operands))
    second = config.precision.gemm.keep_w == "second_copy"
    assert RankBytes(config, VOCAB, dp=1, micro_batches=1).transposed() == (0 if second else turned)
    if config.precision.weights == "fp8":
        assert weight_bytes(trainer) >= before + turned


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_bytes_of_the_quick_start(level: str) -> None:
    config = load_config(QUICKSTART, [*SMALL, f"precision.level={level}"]).config
    trainer = Trainer(config, alone(), vocab_size=4096)
    trainer.step(0, torch.randint(4096, (1, 2, 257)))
    stored = stored_bytes(trainer)
    assert RankBytes(config, 4096, dp=1, micro_batches=1).largest() == stored
    text = summarise(load_config(QUICKSTART, [*SMALL, f"precision.level={level}"]), None)
    assert str(stored) in text
    assert f"all in      {stored.all_in()}\n" in text
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert f"parameters  {count:,}, " in text


WIDE = {
    "model": {
        "family": "llama",
        "num_layers": 3,
        "hidden_size": 256,
        "num_heads": 4,
        "ffn_hidden_size": 512,
        "vocab_size": 200,
    }
}
SPREAD: dict[str, tuple[Layout, list[str]]] = {
    "ZeRO by rows": (Layout(), ["precision.level=O3"]),
    "ZeRO by tensors": (Layout(), ["precision.level=O3", "parallel.zero_partition=whole_tensor"]),
    "ZeRO, BF16 to owners": (Layout(), ["precision.level=O3", "precision.gradient.fp8.reduce=bf16"]),
    "ZeRO of O0": (Layout(), ["parallel.zero=1"]),
    "tensor parallel": (Layout(tp=2), ["precision.level=O2", "parallel.tp=2"]),
    "released": (Layout(), [FP8, *RELEASED, "train.micro_batch_size=4"]),
    "released to owners": (Layout(), ["parallel.zero=1", *RELEASED, "train.micro_batch_size=4"]),
    "released parts": (Layout(tp=2), [FP8, "parallel.tp=2", *RELEASED, "train.micro_batch_size=8"]),
    "FP8 head, pipeline": (Layout(pp=2), [FP8, "parallel.pp=2", "precision.gemm.head=fp8"]),
    "pipeline": (Layout(pp=2), ["precision.level=O2", "parallel.pp=2", "model.tie_embeddings=true"]),
}


def stored_by_ranks(
    group: dist.ProcessGroup, rank: int, world_size: int, layout: Layout, overrides: list[str]
) -> list[tuple[int, dict[str, float]]]:
    """Runs in the pool: bytes of the whole part, and per parameter, of this rank."""
    config = tiny_config(overrides, **WIDE)
    stored = stored_bytes(Trainer(config, joined_processes(torch.device("cpu"), layout), vocab_size=200))
    return [(stored.model.total, stored.per_parameter())]


@pytest.mark.parametrize("name", SPREAD)
def test_bytes_of_the_largest_rank(name: str, gloo_pool: Any) -> None:
    """Messages are padded by less than a block for each bucket."""
    layout, overrides = SPREAD[name]
    ranks = gloo_pool.run(stored_by_ranks, 2, layout, overrides)
    whole, shares = max((found for [found] in ranks), key=lambda found: found[0])
    computed = planned(tiny_config(overrides, **WIDE), 2)
    assert computed.model.total == pytest.approx(whole, rel=1e-3)
    assert computed.per_parameter() == pytest.approx(shares, rel=1e-3)


def test_the_lines(tmp_path: Path) -> None:
    gpu = tmp_path / "nvidia"
    overrides = [*SMALL, "precision.level=O2", "precision.gemm.last_layers_bf16=1", "train.steps=1500"]
    resolved = load_config(QUICKSTART, [*overrides, "train.global_batch_size=8"])
    text = summarise(resolved, 2, nvidia=gpu)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert len(lines) <= 10
    # Per layer 64 x (64 + 2 x 32) + 64 x 64 + 64 x 512 + 256 x 64 = 61,440; embedding 4096 x 64; norms 5 x 64
    assert lines["parameters"] == "385,344, 61,440 of them in linears that multiply in FP8"
    assert lines["step"] == (
        "2,048 tokens: 8 samples of 256; 2 micro-batches of 2 on each of 2 data-parallel ranks"
    )
    assert lines["length"] == "1,500 steps, 3.07M tokens, 7.97 for each parameter"
    assert lines["layout"] == "2 processes = dp 2 x pp 1 x cp 1 x tp 1"
    assert lines["precision"] == (
        "O2, recipe current, FP8: 4 of 9 linears; skipped 5 (first/last layers: 4, head: 1)"
    )
    assert "on a CPU: FP8 GEMMs are computed on the same operands in BF16" in lines["machine"]
    assert lines["bytes"].endswith("(on a GPU + 60.0 KiB of transposed weights while a step runs)")
    gpu.mkdir()
    assert "on a CPU" not in summarise(resolved, 2, nvidia=gpu)
    assert "on a CPU" in summarise(load_config(QUICKSTART, [*overrides, "run.device=cpu"]), 1, nvidia=gpu)
    with pytest.raises(ConfigError, match="must be a multiple of"):
        summarise(resolved, 3, nvidia=gpu)


def test_a_ramp_and_an_unknown_vocabulary_are_said() -> None:
    ramp = "train.batch_size_ramp=[{steps: 10, global_batch_size: 2}]"
    text = summarise(load_config(QUICKSTART, ["data.prefix=none", ramp, "train.global_batch_size=4"]), None)
    assert "vocabulary 32000 assumed: no model.vocab_size and no dataset yet" in text
    assert "1,024 tokens: 4 samples of 256, after a ramp;" in text
    assert "1,000 steps, 1.02M tokens" in text  # 10 of 2 samples, 990 of 4


def test_many_tokens_and_few_heads_are_said_in_plain_numbers() -> None:
    text = summarise(load_config(ROOT / "configs/3d/llama3_8b.yaml"), None)
    assert "32 heads (8 key/value heads), MLP 14336" in text
    assert "15.0T tokens, 1,868 for each parameter" in text  # 15e12 / 8.03e9
    assert "2 heads (1 key/value head)," in summarise(load_config(QUICKSTART, SMALL), None)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from fp8train.config.resolve import load_config\n"
        "from fp8train.planning.summary import summarise\n"
        f"summarise(load_config(Path({str(QUICKSTART)!r})), None)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
