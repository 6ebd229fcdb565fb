"""A block of fused functions computes what the layers one by one do: losses and weights to the bit, here with
the references of the fused operations. When it is used, and when it is not."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fp8train.kernels import fused_op, gemm
from fp8train.kernels.operands import amax_partials
from fp8train.layers import fp8_linear, fp8_weight, fused_linear, grad_weight_op
from fp8train.layers.gradient_amax import GradientAmax
from fp8train.live.describe import describe_precision
from fp8train.models import decoder
from fp8train.models.fused_block import FusedBlock, fused_block
from fp8train.optim import publishing
from fp8train.step.trainer import Trainer
from tests.training.tiny import alone, tiny_config

VOCAB, LENGTH = 512, 24
LLAMA = ["model.family=llama", "model.num_kv_heads=2"]
ANY_SCALE = [f"precision.gemm.{use}.x.power_of_two=false" for use in ("output", "grad_weight")]
GPT = ["model.family=gpt", "model.bias=false"]


def trainer(*overrides: str) -> Trainer:
    config = tiny_config(
        [
            "model.num_layers=2",
            "model.hidden_size=64",
            "model.ffn_hidden_size=96",
            "model.num_heads=4",
            f"model.vocab_size={VOCAB}",
            f"data.seq_length={LENGTH}",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            *overrides,
        ]
    )
    return Trainer(config, alone(), vocab_size=VOCAB)


def trained(*overrides: str, fuse: bool) -> tuple[list[tuple[float, float]], dict[str, Tensor], int]:
    """(loss and gradient norm of each step, weights after them, how many blocks were fused)."""
    used = 0

    def counted(block: torch.nn.Module, x: Tensor, *amax: GradientAmax | None) -> FusedBlock | None:
        nonlocal used
        result = fused_block(block, x, *amax)
        used += result is not None
        return result

    run, history = trainer(*overrides), []
    tokens = torch.randint(VOCAB, (2, 2, LENGTH + 1), generator=torch.Generator().manual_seed(7))
    with ExitStack() as stack:
        for module in (fused_op, fp8_weight, publishing):
            stack.enter_context(patch.object(module, "fuses", lambda x: fuse))
        stack.enter_context(patch.object(decoder, "fused_block", counted))
        for step in range(3):
            result = run.step(step, tokens)
            history.append((float(result.loss), result.grad_norm))
    return history, {k: v.detach().clone() for k, v in run.model.state_dict().items()}, used


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_training_has_the_same_bits(level: str, recompute: str) -> None:
    settings = (*LLAMA, f"precision.level={level}", f"train.activation_checkpointing={recompute}")
    (one, weights, without), (other, fused_weights, used) = (
        trained(*settings, fuse=f) for f in (False, True)
    )
    assert without == 0 and used == 3 * 2 * 2  # steps, micro-batches, blocks
    assert one == other
    assert one[-1][0] < one[0][0]
    for name, weight in weights.items():
        assert torch.equal(weight, fused_weights[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        (*LLAMA, "precision.level=O2", "model.activation=gelu"),
        (*LLAMA, "precision.level=O2", "model.activation=gelu_tanh"),
        (*LLAMA, "precision.level=O1", "precision.recipe=te_delayed"),
        (*LLAMA, "precision.level=O1", "precision.recipe=cscale"),
        (*LLAMA, "precision.level=O2", "model.norm_gain=false"),
        (*LLAMA, "precision.gemm.fp8=true", *ANY_SCALE),
    ],
    ids=["gelu", "gelu_tanh", "delayed", "constant", "no gain", "any scale"],
)
def test_other_settings_have_the_same_bits(settings: tuple[str, ...]) -> None:
    (one, weights, _), (other, fused_weights, used) = (trained(*settings, fuse=f) for f in (False, True))
    assert used == 12
    assert one == other
    for name, weight in weights.items():
        assert torch.equal(weight, fused_weights[name]), name


@pytest.mark.parametrize("fuse", [False, True])
def test_only_the_forward_gemms_accumulate_fast(monkeypatch: pytest.MonkeyPatch, fuse: bool) -> None:
    fast: list[bool] = []

    def spy(*args: Tensor, fast_accumulation: bool = False, **options: object) -> Tensor:
        fast.append(fast_accumulation)
        return gemm.fp8_gemm(*args, fast_accumulation=fast_accumulation, **options)  # type: ignore[arg-type]

    for module in (fp8_linear, fused_linear, grad_weight_op):
        monkeypatch.setattr(module, "fp8_gemm", spy)
    trained(*LLAMA, "precision.level=O2", fuse=fuse)
    # Steps, micro-batches, blocks, linears, GEMMs.
    assert (sum(fast), len(fast)) == (3 * 2 * 2 * 4, 3 * 2 * 2 * 4 * 3)


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_layer_norms_differ_by_the_order_of_their_sums(level: str) -> None:
    settings = (*GPT, f"precision.level={level}")
    (one, weights, _), (other, fused_weights, used) = (trained(*settings, fuse=f) for f in (False, True))
    assert used == 12
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert one[0][0] == pytest.approx(other[0][0], rel=1e-6)
    for name, weight in weights.items():
        difference = (weight.float() - fused_weights[name].float()).square().mean().sqrt()
        assert difference < 5e-3 * weight.float().square().mean().sqrt() + 1e-6, name


@pytest.mark.parametrize(
    "settings",
    [
        ("model.family=gpt", "model.bias=true"),
        (*LLAMA, "precision.compute=fp64"),
        (*LLAMA, "precision.recipe=mus"),
        (*LLAMA, "precision.level=O1", "precision.recipe=rowwise"),
        (*LLAMA, "precision.level=O1", "precision.gemm.keep_x=bf16"),
        (*LLAMA, "precision.level=O1", "precision.activations=fp8"),
        (*LLAMA, "precision.level=O1", "precision.gemm.smooth_swiglu=token"),
        (*LLAMA, "model.qk_norm=gain"),
    ],
    ids=["bias", "fp64", "factors", "rows", "keep_x", "fp8 activations", "smooth", "qk norm"],
)
def test_layers_run_one_by_one_where_fused_functions_would_not_do(settings: tuple[str, ...]) -> None:
    block = next(iter(trainer(*settings).model.held_blocks()))
    x = torch.zeros(2, LENGTH, 64, dtype=block.attention.qkv.weight.dtype)
    with patch.object(fused_op, "fuses", lambda x: True):
        assert fused_block(block, x) is None


def test_fused_blocks_are_not_compiled() -> None:
    with patch.object(fused_op, "fuses", lambda x: True):
        run = trainer(*LLAMA, "precision.level=O2", "train.compile=block")
        block = next(iter(run.model.held_blocks()))
        assert not block.compiled
        assert fused_block(block, torch.zeros(2, LENGTH, 64, dtype=torch.bfloat16)) is not None
    said = "2 of 2 blocks run as fused functions, which leave nothing to compile"
    assert f"compile: {said}" in describe_precision(run)


def test_blocks_that_are_not_fused_are_compiled() -> None:
    """What their backward reads of a weight is made before, outside of their graphs."""
    biased = ("model.family=gpt", "model.bias=true", "precision.level=O2", "train.compile=block")
    with patch.object(fused_op, "fuses", lambda x: True), patch.object(fp8_weight, "fuses", lambda x: True):
        run = trainer(*biased)
        blocks = run.model.held_blocks()
        weights = [linear._fp8_weight for block in blocks for linear in block.linears]
        assert all(block.compiled for block in blocks)
        with torch.no_grad():
            run.model.prepare()
        assert all(weight is not None and weight.backward is None for weight in weights)
        run.model.prepare()
        assert all(weight is not None and weight.backward is not None for weight in weights)
    assert "compile: 2 blocks" in describe_precision(run)


def test_padded_products_reach_the_next_block() -> None:
    """Widths that are no multiples of 16: products are cut out of padded ones."""
    settings = (*LLAMA, "precision.level=O2", "model.hidden_size=40", "model.ffn_hidden_size=56")
    (one, _, _), (other, _, used) = (trained(*settings, fuse=f) for f in (False, True))
    assert used == 12
    assert one == other


def test_sampled_steps_run_one_by_one_for_their_statistics() -> None:
    run = trainer(*LLAMA, "precision.level=O2", "logging.cast_statistics_interval=1")
    block = next(iter(run.model.held_blocks()))
    x = torch.zeros(2, LENGTH, 64, dtype=torch.bfloat16)
    assert run.monitors.recorder is not None
    with patch.object(fused_op, "fuses", lambda x: True):
        assert fused_block(block, x) is not None
        run.monitors.recorder.active = True
        assert fused_block(block, x) is None


@pytest.mark.parametrize(
    "settings",
    [
        (*LLAMA, "precision.recipe=mus"),
        (*LLAMA, "precision.level=O1", "precision.recipe=rowwise"),
        ("model.family=gpt", "model.bias=true", "model.norm=rmsnorm"),
        (*LLAMA, "model.qk_norm=gain", "precision.level=O2"),
    ],
    ids=["factors", "rows", "bias", "qk norm"],
)
def test_layers_one_by_one_have_the_same_bits_with_fused_operations(settings: tuple[str, ...]) -> None:
    (one, weights, _), (other, fused_weights, used) = (trained(*settings, fuse=f) for f in (False, True))
    assert used == 0
    assert one == other
    for name, weight in weights.items():
        assert torch.equal(weight, fused_weights[name]), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_that_a_norm_has_written_are_not_read_for_their_amax(recompute: str) -> None:
    """Of three gradients that enter halves of two blocks, and the last's, only the last's is."""
    read: list[torch.Size] = []

    def spy(x: Tensor) -> Tensor:
        read.append(x.shape)
        return amax_partials(x)

    settings = (*LLAMA, "precision.level=O2", f"train.activation_checkpointing={recompute}")
    with patch.object(fused_linear, "amax_partials", spy):
        trained(*settings, fuse=True)
    forwards = 2 if recompute == "full" else 1  # attention's outputs, which a library's kernel writes
    assert len(read) == 3 * 2 * (2 * forwards + 1)  # steps, micro-batches, (blocks, the last gradient)
