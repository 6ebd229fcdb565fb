"""Compiled blocks: full graphs, one graph for all layers, the gradients of eager execution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fp8train.comm.collectives import CountedGroup
from fp8train.models.build import BuiltModel
from fp8train.models.connect import connect_linears, make_fp8_parts
from fp8train.numerics.statistics import CastRecorder
from fp8train.parallel.gradients.gradient_buckets import GradientBuckets, Groups
from fp8train.parallel.gradients.store import GradientStore
from fp8train.precision.gradients import Gradients
from tests.models.settings import FAMILIES, fill, gradients, random_tokens, tiny_built, tiny_config
from tests.parallel.gradients.reading import gradient_of

LAYERS = 3


def build(family: str, *, compiled: bool, fp8: bool, compute: str, mode: str = "none") -> BuiltModel:
    train: dict[str, Any] = {"activation_checkpointing": mode, "compile": "block" if compiled else "off"}
    precision = {"compute": compute, "gemm": {"fp8": fp8}}
    settings = {**FAMILIES[family], "num_layers": LAYERS, "hidden_size": 16, "num_heads": 2, "init_std": 0.2}
    if family == "llama":
        settings["num_kv_heads"] = 1
    return tiny_built(tiny_config(settings, precision=precision, train=train))


def autograd_gradients(built: BuiltModel, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """:func:`gradients` without a gradient store."""
    connect_linears(built, make_fp8_parts(built))
    fill(built.model)
    return gradients(built.model, tokens, targets)


def stored_gradients(built: BuiltModel, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """As :func:`gradients`, of two equal micro-batches, through a gradient store."""
    model = built.model
    plan = GradientBuckets(
        dict(model.named_parameters()),
        Gradients(bucket_mib=2**-8),
        groups=Groups(CountedGroup(None)),
        device=torch.device("cpu"),
    )
    store = GradientStore(model, plan)
    assert len(store.buckets) > 1
    connect_linears(built, make_fp8_parts(built), sink_slot=store.sink_slot)
    fill(model)
    store.begin_step(2)
    for _ in range(2):
        (model(tokens, targets) / (2 * targets.numel())).backward()
    store.finish()
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: gradient_of(store, name).clone() for name, _ in model.named_parameters()}


SLOW = pytest.mark.slow


def case(family: str, mode: str, store: str, precision: str, *marks: pytest.MarkDecorator) -> Any:
    """One compilation: seconds each, so most are slow."""
    return pytest.param(
        family, mode, store, precision, id=f"{family}, {mode}, {store}, {precision}", marks=marks
    )


@pytest.mark.parametrize(
    ("family", "mode", "store", "precision"),
    [
        case("gpt", "none", "store", "fp32"),
        case("llama", "none", "store", "fp8"),
        case("llama", "full", "store", "fp32"),
        case("llama", "none", "store", "fp32", SLOW),
        case("gpt", "none", "store", "fp8", SLOW),
        case("llama", "selective", "store", "fp8", SLOW),
        case("llama", "selective", "store", "fp32", SLOW),
        case("llama", "full", "store", "fp8", SLOW),
        case("gpt", "selective", "store", "fp8", SLOW),
        case("gpt", "full", "no store", "fp8", SLOW),
        case("llama", "none", "no store", "fp8", SLOW),
        case("llama", "none", "no store", "fp64", SLOW),
        case("llama", "selective", "no store", "fp64", SLOW),
        case("gpt", "none", "no store", "fp64", SLOW),
        case("gpt", "full", "no store", "fp64", SLOW),
    ],
)
def test_gradients_equal_eager(family: str, mode: str, store: str, precision: str) -> None:
    """FP32 within 1e-5 (fused loops round elsewhere), FP64 within 1e-12.

    In FP8 a last-bit difference of a source can move a code by a step (2^-4 of one element in E4M3, 2^-3 in
    E5M2), so single elements may differ by that; the norm stays within 2 %.
    """
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=4)
    measure = stored_gradients if store == "store" else autograd_gradients
    settings: dict[str, Any] = {"fp8": precision == "fp8", "mode": mode}
    settings["compute"] = "fp64" if precision == "fp64" else "fp32"
    eager = measure(build(family, compiled=False, **settings), tokens, targets)
    torch._dynamo.reset()
    counters.clear()
    compiled = measure(build(family, compiled=True, **settings), tokens, targets)
    assert counters["stats"]["unique_graphs"] == 1, f"{LAYERS} layers share one graph"
    assert not counters["graph_break"]
    tolerance = {"fp32": 1e-5, "fp64": 1e-12, "fp8": 2e-2}[precision]
    for name, expected in eager.items():
        assert expected.count_nonzero() > 0, name
        assert (compiled[name] - expected).norm() <= tolerance * expected.norm(), name


@SLOW
def test_sampling_of_cast_statistics_takes_one_more_graph() -> None:
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=4)
    rows = []
    torch._dynamo.reset()
    counters.clear()
    for compiled in (True, False):
        built = build("llama", compiled=compiled, fp8=True, compute="fp32")
        sites = [f"{path}/{use}" for path in built.model.linears() for use in ("x", "w", "grad_output")]
        recorder = CastRecorder(sites, torch.device("cpu"))
        connect_linears(built, make_fp8_parts(built, recorder=recorder))
        fill(built.model)
        for active in (False, True):
            recorder.active = active
            gradients(built.model, tokens, targets)
        assert list(recorder.collect()) == sites
        rows.append(recorder.rows)
    assert counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-4)
