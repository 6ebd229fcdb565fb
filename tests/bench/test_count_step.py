"""What a training step asks of a GPU must not grow: ceilings on launches, bytes and host waits, at the shapes
of Llama-3-8B with 8,192 tokens. And the counter itself, against counts by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from fp8train.kernels.operands import CastRule, amax_partials, cast_operand
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec
from tools.bench.ceilings import GPUS
from tools.bench.count_step import Report, report
from tools.bench.step_counter import StepCounter

LLAMA = Path(__file__).parents[2] / "configs/llama/llama3_8b.yaml"
H100 = GPUS["H100"]
SETTINGS = ["train.global_batch_size=1", "train.activation_checkpointing=none"]


@cache
def counted(level: str, length: int = 8192) -> Report:
    settings = [f"precision.level={level}", f"data.seq_length={length}", *SETTINGS]
    return report(LLAMA, settings, H100)


def test_a_block_at_o2_stays_cheap() -> None:
    found = counted("O2")
    passes = ("weights", "forward", "backward", "reduce", "norm")
    assert found.block("launches", passes) <= 54
    assert found.block("elementwise_bytes", passes) <= 6.9e9
    assert not found.gemms, "the tensor cores take every GEMM as it lies"
    in_gemms = found.block_parameters - 2 * 4096  # norms multiply nothing
    assert found.block("gemm_flops") == 6 * in_gemms * 8192


@pytest.mark.parametrize(
    ("recipe", "gpu", "launches", "gigabytes"),
    [("blockwise", "H100", 68, 7.7), ("rowwise", "H100", 72, 9.3), ("mxfp8", "B200", 84, 8.1)],
)
def test_scales_of_rows_and_blocks_take_one_read_for_two_casts(
    recipe: str, gpu: str, launches: int, gigabytes: float
) -> None:
    settings = [f"precision.recipe={recipe}", "precision.level=O2", *SETTINGS]
    found = report(LLAMA, settings, GPUS[gpu], optimizer=False)
    assert found.block("launches", ("forward", "backward", "reduce", "norm")) <= launches
    assert found.block("elementwise_bytes", ("forward", "backward")) <= gigabytes * 1e9
    assert not found.gemms, "the tensor cores take every GEMM as it lies"


def test_the_host_waits_once_a_step() -> None:
    assert sum(counted("O2").syncs.values()) == 1


def test_what_cuda_graphs_record_waits_for_nothing() -> None:
    """Nor does it copy from the host."""
    for level in ("O0", "O2"):
        assert counted(level).unrecordable == {}


def test_the_optimizer_is_one_pass() -> None:
    """Bytes of an element: gradient 1; master, m and v 5, read and written; scales of blocks. The FP8 weight
    is cast beside it: the stored master 2, codes in two layouts 2."""
    found = counted("O2")
    assert found.block("elementwise_bytes", ("optimizer",)) <= 11.1 * found.block_parameters
    assert found.block("elementwise_bytes", ("optimizer", "weights")) <= 15.1 * found.block_parameters
    assert found.rest("launches", ("optimizer",)) <= 8
    assert found.block("launches", ("optimizer",)) <= found.block_parameters / 2**26


@pytest.mark.parametrize(("length", "ratio"), [(8192, 1.35), (2048, 1.45)])
def test_fp8_is_predicted_to_pay(length: int, ratio: float) -> None:
    bf16, fp8 = (counted(level, length) for level in ("O0", "O2"))
    assert bf16.block("attention_flops") == fp8.block("attention_flops")
    assert bf16.seconds / fp8.seconds >= ratio


def test_counts_of_single_operations() -> None:
    x = torch.empty(256, 128, dtype=torch.bfloat16, device="meta")
    with StepCounter(H100) as counter:
        counter.restart()
        with counter.phase("one"):
            y = x + x  # reads one tensor twice, as a kernel would
            y.t().contiguous()
            x @ y.t()
            cast_operand(x, amax_partials(x), CastRule.of(QuantSpec(E4M3)), turned=True)
            float(y.sum())
    counts = counter.counts
    size = 256 * 128
    elementwise = counts.total(phase="one", kind="elementwise")
    assert elementwise.launches == 2 + 2 + 1
    partials = 4 * 4
    cast = 2 * size + partials + (2 * size + partials + 2 * size + 8)
    assert elementwise.moved == 6 * size + 4 * size + cast + (2 * size + 2)
    gemm = counts.total(phase="one", kind="gemm_bf16")
    assert (gemm.launches, gemm.flops) == (1, 2 * 256 * 256 * 128)
    assert sum(counts.syncs.values()) == 1
    assert not +counts.unrecordable
    assert counter.live >= 2 * size


def test_what_a_graph_cannot_record_is_counted() -> None:
    x = torch.empty(16, device="meta")

    def step() -> None:
        x * 2.0 + 1
        float(x.sum())
        torch.ones(1).to("meta")

    with StepCounter(H100) as counter:
        step()
        assert not +counter.counts.unrecordable
        counter.restart()
        counter.recorded(step)()
    assert sum(counter.counts.unrecordable.values()) == 2
    assert sum(counter.counts.syncs.values()) == 1
