"""ZeRO-1 and 2 of DeepSpeed with gradients that travel in FP8, at two ranks: averages against FP64, bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8train.numerics.block_scales import as_blocks, quantize_blocks
from fp8train.precision.number_formats import E4M3
from tests.deepspeed_engine.two_ranks import needs_deepspeed, on_two_ranks

pytestmark = [*needs_deepspeed, pytest.mark.slow]

SHAPES = {"first": (24, 40), "vector": (50,), "second": (70, 64), "third": (33, 17)}
PLAN = ("first", "second", "third")
BLOCK = 32
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2, small buckets, overlapped": {"stage": 2, "reduce_bucket_size": 1500, "overlap_comm": True},
    "ZeRO-1, BF16": {"stage": 1, "bf16": True},
    "ZeRO-2, BF16": {"stage": 2, "bf16": True, "overlap_comm": False},
    "ZeRO-2, BF16, FP32 averages": {"stage": 2, "bf16": True, "grad_accum_dtype": "fp32"},
}


class Weights(nn.Module):
    """A loss whose gradients are what it is told."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, coefficients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * coefficients[name]).sum() for name, p in self.named_parameters()]).sum()


def gradients(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for name, shape in SHAPES.items():
        size = torch.exp(1.5 * torch.randn(shape, generator=generator))
        found[name] = (1e-3 * size * torch.randn(shape, generator=generator).sign()).to(dtype)
    return found


def engine_of(case: dict[str, Any], model: nn.Module) -> Any:
    import deepspeed

    zero = {k: v for k, v in case.items() if k in ("stage", "reduce_bucket_size", "overlap_comm")}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"overlap_comm": False, **zero},
    }
    if case.get("bf16"):
        settings |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
    if "grad_accum_dtype" in case:
        settings["data_types"] = {"grad_accum_dtype": case["grad_accum_dtype"]}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def reduce(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from fp8train.deepspeed_engine.fp8_reduction import Fp8ReducingZeroOptimizer

    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    model = Weights().to(dtype)
    engine = engine_of(case, model)
    plan = [parameter for name, parameter in model.named_parameters() if name in PLAN]
    zero = Fp8ReducingZeroOptimizer.adopt(engine.optimizer, plan, fmt=E4M3, block=BLOCK)
    assert zero is engine.optimizer
    engine.backward(engine(gradients(rank, dtype)))
    found = {name: safe_get_full_grad(p).float().clone() for name, p in model.named_parameters()}
    engine.step()
    moved = {name: safe_get_full_fp32_param(p).float().clone() for name, p in model.named_parameters()}
    sent = dict(zero.reduced.sent)
    return {"grads": found, "moved": moved, "sent": sent, "partition": int(zero.partition_size[0])}


def every_case(rank: int) -> dict[str, dict[str, Any]]:
    return {name: reduce(rank, case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return on_two_ranks(tmp_path_factory.mktemp("fp8_reduction"), every_case)


def told(values: Tensor, start: int, partition: int) -> tuple[Tensor, list[int]]:
    """What FP8 says of a parameter that begins at ``start`` of the flat vector, FP64, and its blocks by
    owner."""
    flat, pieces, blocks = values.flatten(), [], [0, 0]
    while len(flat):
        owner = start // partition
        part, flat = flat.split([n := min(len(flat), (owner + 1) * partition - start), len(flat) - n])
        payload, scales = quantize_blocks(as_blocks(part, BLOCK), E4M3)
        pieces.append((payload.double() * torch.exp2(scales.double() - 127)[:, None]).view(-1)[:n])
        blocks[owner] += len(scales)
        start += n
    return torch.cat(pieces).view(values.shape), blocks


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CASES)
def test_averages_and_bytes(name: str, ranks: list[dict[str, dict[str, Any]]]) -> None:
    case = CASES[name]
    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    sources = [gradients(rank, dtype) for rank in range(2)]
    wide = not case.get("bf16") or case.get("grad_accum_dtype") == "fp32"
    for rank, result in enumerate(results[name] for results in ranks):
        start, elsewhere = 0, 0
        for parameter, shape in SHAPES.items():
            grad, numel = result["grads"][parameter], math.prod(shape)
            exact = (sources[0][parameter].double() + sources[1][parameter].double()) / 2
            expected = exact
            if parameter in PLAN:
                sides = [told(source[parameter] / 2, start, result["partition"]) for source in sources]
                expected = sides[0][0] + sides[1][0]
                elsewhere += sides[0][1][1 - rank]
                error = float((expected - exact).norm() / exact.norm())
                assert 0.01 < error < 2.0**-4, "FP8 loses this much of a gradient"
            tolerance = (2.0**-22 if wide else 2.0**-8) * float(expected.abs().max())
            torch.testing.assert_close(grad.double(), expected, rtol=0, atol=tolerance)
            if wide:
                torch.testing.assert_close(result["moved"][parameter], -grad, rtol=1e-6, atol=1e-9)
            start += numel
        assert result["sent"]["all_to_all/gradient"] == elsewhere * (BLOCK + 1)
        assert result["sent"]["all_reduce/gradient_wide"] == math.prod(SHAPES["vector"]) * 4


def refused(rank: int) -> list[str]:
    from fp8train.deepspeed_engine.fp8_reduction import Fp8ReducingZeroOptimizer

    messages = []
    engine = engine_of({"stage": 1}, Weights())
    engine.optimizer.reduce_scatter = False
    for optimizer in (engine.optimizer, engine.optimizer.optimizer):
        try:
            Fp8ReducingZeroOptimizer.adopt(optimizer, [], fmt=E4M3, block=BLOCK)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_other_optimizers_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    reduction, other = on_two_ranks(tmp_path_factory.mktemp("refused"), refused)[0]
    assert reduction == (
        "gradients in FP8 need zero_optimization.reduce_scatter: true in DeepSpeed's settings"
    )
    assert "need DeepSpeed's optimizer of ZeRO-1 or 2, not a SGD; write parallel.zero: 1 or 2" in other
