"""What ``engine`` allows beside it: rules between sections that the file alone shows.

DeepSpeed keeps master weights, gradients between backward and step, and their reduction. What our formats ask
of those is honoured where its engine leaves room, and refused with the reason where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fp8train.config.all_sections import AllSections
from fp8train.config.layout import LayoutProblem

_OWN_STAGES = ("none", 1)


class _Refusal(NamedTuple):
    """One setting that does not go with ``engine: deepspeed``."""

    holds: bool
    key: str
    value: Any
    remedy: str
    reason: str


def engine_problems(config: AllSections) -> Iterator[LayoutProblem]:
    """Everything that does not go with the engine."""
    if config.engine == "native":
        yield from _native(config)
        return
    for one in _refusals(config):
        if one.holds:
            yield LayoutProblem(
                f"engine: deepspeed: {one.key}: {_text(one.value)} {one.reason}; write {one.key}: "
                f"{one.remedy}, or engine: native",
                (one.key, "engine"),
            )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _native(config: AllSections) -> Iterator[LayoutProblem]:
    zero = config.parallel.zero
    if zero not in _OWN_STAGES:
        yield LayoutProblem(
            f"parallel.zero: {zero} splits {'gradients' if zero == 2 else 'gradients and parameters'} and is "
            "DeepSpeed's; write engine: deepspeed, or parallel.zero: 1",
            ("parallel.zero", "engine"),
        )
    if config.optimizer.offload == "nvme":
        yield LayoutProblem(
            "optimizer.offload: nvme keeps states on a disk and is DeepSpeed's; write engine: deepspeed, or "
            "optimizer.offload: cpu for host memory",
            ("optimizer.offload", "engine"),
        )


def _refusals(config: AllSections) -> Iterator[_Refusal]:
    yield from _layout(config)
    yield from _formats(config)
    yield from _execution(config)


def _layout(config: AllSections) -> Iterator[_Refusal]:
    parallel = config.parallel
    reason = "leaves DeepSpeed nothing to do that this package does not"
    yield _Refusal(parallel.zero == "none", "parallel.zero", "none", "1, 2 or 3", reason)
    for axis in ("tp", "cp", "pp"):
        size = getattr(parallel, axis)
        reason = "cuts the model, and only data-parallel ranks are wired to it"
        yield _Refusal(size > 1, f"parallel.{axis}", size, "1", reason)
    reason = "is where ZeRO-3's parameters rest"
    outside = config.deepspeed.offload_param != "none" and parallel.zero != 3
    yield _Refusal(outside, "deepspeed.offload_param", config.deepspeed.offload_param, "none", reason)


def _formats(config: AllSections) -> Iterator[_Refusal]:
    precision, zero = config.precision, config.parallel.zero
    yield _Refusal(
        precision.compute == "fp64",
        "precision.compute",
        "fp64",
        "fp32",
        "is no type that DeepSpeed trains in",
    )
    if not precision.gemm.fp8:
        return
    weights = precision.weights
    yield _Refusal(
        weights == "fp8",
        "precision.weights",
        weights,
        "compute",
        "rests weights in FP8, but DeepSpeed writes them, in the compute type",
    )
    state, gradient = precision.state, precision.gradient
    yield _Refusal(
        state.master.format != "fp32",
        "precision.state.master.format",
        state.master.format,
        "fp32",
        "is a master weight's, and DeepSpeed keeps those, in FP32",
    )
    offloads = config.optimizer.offload != "none"
    for role in ("exp_avg", "exp_avg_sq"):
        one, key = getattr(state, role), f"precision.state.{role}"
        # Whether ours may be used at all, and then how: a flat partition has no tensors to share a scale.
        reason = "is ours, but DeepSpeed's CPU optimizer keeps offloaded states, in FP32"
        if zero == 3:
            reason = "is ours, but DeepSpeed's ZeRO-3 moves states itself, in FP32"
        owned = zero == 3 or offloads
        yield _Refusal(owned and one.format != "fp32", f"{key}.format", one.format, "fp32", reason)
        scaled = one.format in ("e4m3", "e5m2", "fp16_scaled")
        yield _Refusal(
            not owned and scaled and one.granularity == "tensor",
            f"{key}.granularity",
            "tensor",
            "block",
            "shares a scale over a tensor, and DeepSpeed's optimizer sees flat partitions without tensors",
        )
    if gradient.format == "high_precision":
        return
    yield _Refusal(
        zero == 3,
        "precision.gradient.format",
        gradient.format,
        "high_precision",
        "travels in FP8, but DeepSpeed's ZeRO-3 reduces gradients itself",
    )
    yield _Refusal(
        zero != 3 and gradient.fp8.reduce != "exchange",
        "precision.gradient.fp8.reduce",
        gradient.fp8.reduce,
        "exchange",
        "is built on our gradient store; only the exchange of FP8 blocks is wired to DeepSpeed's buckets",
    )
    yield _Refusal(
        gradient.fp8.error_feedback,
        "precision.gradient.fp8.error_feedback",
        True,
        "false",
        "keeps residuals in our gradient store",
    )
    yield _Refusal(
        gradient.fp8.node_size is not None,
        "precision.gradient.fp8.node_size",
        gradient.fp8.node_size,
        "null",
        "is of our gradient store",
    )
    yield _Refusal(
        offloads,
        "precision.gradient.format",
        gradient.format,
        "high_precision",
        "travels in FP8, but DeepSpeed reduces to the host's buffers itself with optimizer.offload",
    )


def _execution(config: AllSections) -> Iterator[_Refusal]:
    train, run, optimizer = config.train, config.run, config.optimizer
    ours = "is our optimizer's, and DeepSpeed has its own"
    yield _Refusal(train.gradient_release, "train.gradient_release", True, "false", ours)
    yield _Refusal(run.cuda_graphs, "run.cuda_graphs", True, "false", "cannot record DeepSpeed's hooks")
    yield _Refusal(
        train.compile != "off", "train.compile", train.compile, "off", "cannot trace DeepSpeed's hooks"
    )
    guard = config.precision.guard.action
    yield _Refusal(
        guard in ("bf16", "recover"),
        "precision.guard.action",
        guard,
        "report",
        "changes what DeepSpeed's hooks were made for",
    )
    after = "would come after the update: DeepSpeed finds the norm and applies it in one call"
    spikes = config.spikes
    acts = spikes.action in ("skip", "rollback")
    yield _Refusal(acts, "spikes.action", spikes.action, "warn", after)
    yield _Refusal(spikes.rerun, "spikes.rerun", True, "false", after)
    yield _Refusal(
        config.kernels.optimizer != "auto", "kernels.optimizer", config.kernels.optimizer, "auto", ours
    )
    multi = config.kernels.multi_tensor
    yield _Refusal(multi != "auto", "kernels.multi_tensor", multi, "auto", "is of our gradient store")
    kind = config.parametrization.kind
    yield _Refusal(
        kind in ("unit_scaling", "umup") and optimizer.clip_grad_norm > 0,
        "optimizer.clip_grad_norm",
        optimizer.clip_grad_norm,
        "0",
        f"is a norm of effective weights under {kind}, and DeepSpeed clips that of the stored ones",
    )
    if optimizer.offload == "none":
        return
    zero = config.parallel.zero
    on_disk = optimizer.offload == "nvme"
    yield _Refusal(on_disk and zero != 3, "optimizer.offload", "nvme", "cpu", "is for parallel.zero: 3")
    yield _Refusal(
        on_disk and config.deepspeed.nvme_path is None,
        "deepspeed.nvme_path",
        "null",
        "/a/folder/on/a/local/disk",
        "leaves optimizer.offload: nvme without a place",
    )
    reason = "is not DeepSpeed's CPU optimizer's, which is AdamW"
    yield _Refusal(optimizer.name != "adamw", "optimizer.name", optimizer.name, "adamw", reason)
    yield _Refusal(
        optimizer.decay_rule != "lr_times_lambda",
        "optimizer.decay_rule",
        optimizer.decay_rule,
        "lr_times_lambda",
        reason,
    )
    yield _Refusal(
        kind != "standard", "parametrization.kind", kind, "standard", "scales gradients, " + reason
    )
