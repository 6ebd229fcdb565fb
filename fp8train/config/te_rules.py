"""What the settings that ask for Transformer Engine's casts and products allow beside them, as far as the
file alone shows. Devices and versions are checked elsewhere (:mod:`fp8train.extensions.check`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fp8train.config.all_sections import AllSections
from fp8train.config.layout import LayoutProblem
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.transformer_engine import NativeRecipe, mismatch, native_recipe

_FAST = ("DelayedScaling", "Float8CurrentScaling")
"""Its recipes whose output GEMMs accumulate fast."""

Refusal = tuple[bool, str, Any, str, str]
"""Whether it holds, the key, its value, what to write there, and why."""


def te_problems(config: AllSections) -> Iterator[LayoutProblem]:
    """Everything that does not go with ``kernels.gemm`` and ``kernels.quantize``."""
    quant = config.precision.gemm.value()
    if quant is None:
        return
    if config.kernels.quantize == "te":
        yield from _refused("kernels.quantize: te", _against_quantisers(config, quant))
        yield from _recipe("kernels.quantize: te", _uncast(quant))
    if config.kernels.gemm == "te" and quant.is_nvfp4:
        yield from _recipe(
            "kernels.gemm: te",
            "the simulation of NVFP4 has values in the compute type, and it multiplies packed FP4 codes; "
            "te_native has Transformer Engine's own NVFP4",
        )
    if config.kernels.gemm == "te_native":
        yield from _refused("kernels.gemm: te_native", _against_native(config))
        recipe = native_recipe(quant)
        yield from _recipe("kernels.gemm: te_native", recipe if isinstance(recipe, str) else None)
        if not isinstance(recipe, str):
            yield from _refused("kernels.gemm: te_native", _accumulation(config, recipe))
            yield from _sizes(config, recipe.multiple)


def _refused(setting: str, refusals: Iterable[Refusal]) -> Iterator[LayoutProblem]:
    key = setting.partition(":")[0]
    for holds, other, value, remedy, reason in refusals:
        if holds:
            text = str(value).lower() if isinstance(value, bool) else value
            yield LayoutProblem(
                f"{setting}: {other}: {text} {reason}; write {other}: {remedy}, or {key}: auto", (other, key)
            )


def _recipe(setting: str, problem: str | None) -> Iterator[LayoutProblem]:
    key = setting.partition(":")[0]
    if problem is not None:
        yield LayoutProblem(
            f"{setting}: {problem}; write another precision.recipe, or {key}: auto", ("precision.recipe", key)
        )


def _uncast(quant: LinearQuant) -> str | None:
    """The first cast that its quantisers do not make, and why."""
    problems = ((use, spec, mismatch(spec)) for use, spec in quant.casts().items())
    return next((f"{use} ({spec}) {reason}" for use, spec, reason in problems if reason is not None), None)


def _against_quantisers(config: AllSections, quant: LinearQuant) -> Iterator[Refusal]:
    tp, compile_, graphs = config.parallel.tp, config.train.compile, config.run.cuda_graphs
    yield tp > 1, "parallel.tp", tp, "1", "shares scales over ranks, and its quantisers see one rank's part"
    yield compile_ != "off", "train.compile", compile_, "off", "cannot trace them"
    delayed = any(spec.scale_source == "delayed" for spec in quant.casts().values())
    waits = "has no place for a look at whether a delayed scale is there yet"
    yield graphs and delayed, "run.cuda_graphs", graphs, "false", waits


def _against_native(config: AllSections) -> Iterator[Refusal]:
    """Its linears cast, multiply, and keep what backward reads, by themselves."""
    precision, gemm, train, run = config.precision, config.precision.gemm, config.train, config.run
    own = "is ours, and its linears cast by themselves"
    for axis in ("tp", "cp", "pp"):
        size = getattr(config.parallel, axis)
        yield size > 1, f"parallel.{axis}", size, "1", "cuts the model, and its linears are not wired to that"
    gradient, weights = precision.gradient.format, precision.weights
    returned = "is made from the operands, and its linears return products in high precision"
    yield gradient != "high_precision", "precision.gradient.format", gradient, "high_precision", returned
    rest = "rests weights in FP8, and its linears cast the values"
    yield weights != "compute", "precision.weights", weights, "compute", rest
    yield gemm.head != "compute", "precision.gemm.head", gemm.head, "compute", own
    yield gemm.smooth_swiglu != "off", "precision.gemm.smooth_swiglu", gemm.smooth_swiglu, "off", own
    quantize, guard = config.kernels.quantize, precision.guard.action
    yield quantize != "auto", "kernels.quantize", quantize, "auto", "makes operands of ours"
    watched = "watches casts, and its linears tell nothing of theirs"
    yield guard != "off", "precision.guard.action", guard, "off", watched
    kind, again = config.parametrization.kind, train.activation_checkpointing
    yield kind != "standard", "parametrization.kind", kind, "standard", "multiplies in GEMMs, and it cannot"
    twice = "runs forward twice, which its scales would see"
    yield again != "none", "train.activation_checkpointing", again, "none", twice
    yield train.compile != "off", "train.compile", train.compile, "off", "cannot trace its linears"
    yield run.cuda_graphs, "run.cuda_graphs", run.cuda_graphs, "false", "was never recorded with them"
    engine = config.engine
    yield engine != "native", "engine", engine, "native", "finds no gradients of its linears"


def _accumulation(config: AllSections, recipe: NativeRecipe) -> Iterator[Refusal]:
    fast, always = config.precision.gemm.fast_accumulation, recipe.name in _FAST
    reason = f"is not what its {recipe.name} does in forward"
    yield always and not fast, "precision.gemm.fast_accumulation", fast, "true", reason


def _sizes(config: AllSections, multiple: int) -> Iterator[LayoutProblem]:
    model = config.model
    tokens = config.train.micro_batch_size * config.data.seq_length
    for key, size in (
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("data.seq_length", tokens),
    ):
        if size % multiple:
            what = "tokens of a micro-batch" if key == "data.seq_length" else "it"
            yield LayoutProblem(
                f"kernels.gemm: te_native: {key}: {what} must be a multiple of {multiple}, and there are "
                f"{size}; change it, or write kernels.gemm: auto",
                (key, "kernels.gemm"),
            )
