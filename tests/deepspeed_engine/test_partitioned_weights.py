"""Our decoder under DeepSpeed's ZeRO-3, at two ranks: losses, gradients and weights are those of one process
that holds everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.models.build import BuiltModel, build_model, initialise
from fp8train.models.connect import Fp8Parts, connect_linears, make_fp8_parts
from tests.deepspeed_engine.two_ranks import needs_deepspeed, on_two_ranks
from tests.training.tiny import VOCAB, tiny_config

pytestmark = [*needs_deepspeed, pytest.mark.slow]

FP8 = ("precision.compute=fp32", "precision.gemm.fp8=true")
VARIANTS: dict[str, tuple[str, ...]] = {
    "high precision": ("precision.compute=fp32",),
    "current": FP8,
    "delayed, FP8 head": (*FP8, "precision.recipe=te_delayed", "precision.gemm.head=fp8"),
    "GPT, tied": (
        *FP8,
        "model.family=gpt",
        "model.positions=learned",
        "model.tie_embeddings=true",
        "model.bias=true",
        "precision.gemm.head=fp8",
    ),
    "block scales, full recomputation": (
        *FP8,
        "precision.recipe=blockwise",
        "train.activation_checkpointing=full",
    ),
    "row scales, selective recomputation": (
        *FP8,
        "precision.recipe=rowwise",
        "train.activation_checkpointing=selective",
    ),
    "channels, saved in FP8": (
        *FP8,
        "precision.gemm.smooth_swiglu=channel",
        "precision.activations=fp8",
        "model.qk_norm=gain",
    ),
}
PERSISTENT = {"channels, saved in FP8": 64}
"""Elements up to which a parameter stays whole. Norms that keep FP8 codes of their input run again in
backward, inside another function's, where DeepSpeed does not expect a module: their vectors must stay."""
STEPS, MICRO, LR = 2, 2, 0.25


def build(overrides: tuple[str, ...], *, partitioned: bool) -> tuple[BuiltModel, Fp8Parts]:
    config = tiny_config(overrides)
    built = build_model(config, vocab_size=VOCAB, device=torch.device("cpu"), partitioned=partitioned)
    parts = make_fp8_parts(built)
    connect_linears(built, parts)
    initialise(built.model, 1)
    return built, parts


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    tokens = torch.randint(VOCAB, (2, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def zero3(rank: int, variant: str) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    built, parts = build(VARIANTS[variant], partitioned=True)
    model, whole = built.model, PERSISTENT.get(variant, 0)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": whole},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for module, parameter in model.borrowed_weights():
        deepspeed.zero.register_external_parameter(module, parameter)
    persistent = engine.optimizer.persistent_parameters
    if persistent:  # DeepSpeed gathers them after the first step
        persistent[0].all_gather(persistent)
    found: dict[str, Any] = {}
    for step in range(STEPS):
        if parts.scales is not None:
            parts.scales.amaxes.zero_()
            parts.scales.active = True
        for micro in range(MICRO):
            loss = engine(*batch(step, micro, rank)) / 16
            found[f"loss {step} {micro}"] = loss.detach().clone()
            engine.backward(loss)
            if micro == 0:
                found["sizes"] = [p.numel() for p in model.parameters()]
            else:
                for name, parameter in model.named_parameters():
                    found[f"grad {step} {name}"] = safe_get_full_grad(parameter).clone()
            engine.step()
        if parts.scales is not None:
            parts.scales.active = False
            parts.scales.advance(
                lambda x: torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX), applied=True
            )
            found[f"amaxes {step}"] = parts.scales.amaxes.clone()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[f"weight {name}"] = parameter.detach().clone()
    return found


def alone(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Both ranks' batches in this process."""
    built, parts = build(overrides, partitioned=False)
    model, scales = built.model, parts.scales
    found: dict[str, Any] = {}
    for step in range(STEPS):
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        if scales is not None:
            scales.amaxes.zero_()
            scales.active = True
        for micro in range(MICRO):
            for rank in range(2):
                loss = model(*batch(step, micro, rank)) / 16
                found[f"loss {step} {micro} {rank}"] = loss.detach()
                (loss / MICRO).backward()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        sums[name] += parameter.grad / 2
                        parameter.grad = None
        if scales is not None:
            scales.active = False
            scales.advance(lambda x: None, applied=True)
            found |= {f"amaxes {step} {rank}": scales.amaxes.clone() for rank in range(2)}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                found[f"grad {step} {name}"] = sums[name]
                parameter -= LR * sums[name]
    found |= {f"weight {name}": p.detach() for name, p in model.named_parameters()}
    return found


def every_variant(rank: int) -> dict[str, dict[str, Any]]:
    return {variant: zero3(rank, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return on_two_ranks(tmp_path_factory.mktemp("zero3"), every_variant)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_one_process(variant: str, ranks: list[dict[str, dict[str, Any]]]) -> None:
    """Up to the order of FP32 sums: DeepSpeed adds ranks first, then micro-batches."""
    expected = alone(VARIANTS[variant])
    for rank, found in enumerate(results[variant] for results in ranks):
        assert max(found["sizes"]) <= PERSISTENT.get(variant, 0), "parameters are partitioned between passes"
        for key, tensor in found.items():
            if key != "sizes":
                other = expected[f"{key} {rank}" if key.startswith(("loss", "amaxes")) else key]
                tolerance = 1e-5 * float(other.abs().max())
                torch.testing.assert_close(tensor, other, rtol=0, atol=tolerance, msg=f"rank {rank}, {key}")
        assert {key for key in found if key.startswith("weight")} <= set(expected)
