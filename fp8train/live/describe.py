"""What a run stores in which format: the header's lines about precision, and bytes per parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fp8train.config.precision_schema import StateFormatConfig
from fp8train.config.schema import Config
from fp8train.deepspeed_engine.trainer import DeepSpeedTrainer
from fp8train.layers.linear import Linear
from fp8train.live import describe_deepspeed
from fp8train.live.console import format_count
from fp8train.live.stored_bytes import Footprint, StoredBytes
from fp8train.models.decoder import Decoder
from fp8train.optim.decay_loss import explain_lost_decay
from fp8train.optim.parameter_state import in_plan
from fp8train.step.base_trainer import BaseTrainer
from fp8train.step.recorded import WARM_UP
from fp8train.step.trainer import Trainer
from fp8train.update_rules.registry import rule_named


def stored_bytes(trainer: BaseTrainer) -> StoredBytes:
    """Count the bytes that ``trainer`` has allocated."""
    if isinstance(trainer, DeepSpeedTrainer):
        return describe_deepspeed.stored_bytes(trainer)
    assert isinstance(trainer, Trainer)
    linears = {f"{path}.weight": linear for path, linear in trainer.model.linears().items()}
    planned = {fqn for fqn, linear in linears.items() if trainer.outline.specs[fqn].in_fp8_plan}
    everything = {fqn for fqn, _ in trainer.model.named_parameters()}
    plan, hidden, model = (_footprint(trainer, linears, fqns) for fqns in (planned, set(linears), everything))
    return StoredBytes(plan, hidden, model, trainer.optimizer.states.slot_bytes)


def _footprint(trainer: Trainer, linears: Mapping[str, Linear], fqns: Collection[str]) -> Footprint:
    """Of the parameters with these names."""
    values = {"weight": 0, "gradient": 0, "accumulator": 0}
    scales = {"weight": 0, "gradient": 0}
    parameters = {fqn: p for fqn, p in trainer.model.named_parameters() if fqn in fqns}
    for fqn, parameter in parameters.items():
        of_scales = linears[fqn].weight_scale_bytes if fqn in linears else 0
        scales["weight"] += of_scales
        values["weight"] += (linears[fqn].weight_bytes if fqn in linears else parameter.nbytes) - of_scales
    head = trainer.model.fp8_head
    if head is not None and trainer.model.head_fqn in fqns:
        scales["weight"] += head.scale_bytes
        values["weight"] += head.nbytes - head.scale_bytes
    for bucket in trainer.store.lasting:
        inside = sum(member.numel for member in bucket.members if member.fqn in fqns)
        share, storage = inside / sum(member.numel for member in bucket.members), bucket.storage
        scales["gradient"] += round(share * storage.scale_bytes)
        values["gradient"] += round(share * (storage.stored_bytes - storage.scale_bytes))
        values["accumulator"] += round(share * storage.accumulator_bytes)
    states = trainer.optimizer.states
    of_states, of_their_scales = states.stored_bytes_of(fqns), states.scale_bytes_of(fqns)
    for role, nbytes in of_states.items():
        values[role] = nbytes - of_their_scales[role]
    values["master"] -= states.bytes_in_parameters(fqns)
    on_host = sum(of_states.values()) - states.bytes_in_parameters(fqns) if states.in_host_memory else 0
    return Footprint(
        sum(p.numel() for p in parameters.values()), values, {**scales, **of_their_scales}, on_host
    )


def describe_layout(trainer: BaseTrainer) -> str:
    """The process layout and the parameters of each rank; every rank calls it."""
    processes, parallel = trainer.processes, trainer.config.parallel
    held = trainer.model if isinstance(trainer, Trainer) else trainer.outline
    own = torch.tensor([sum(p.numel() for p in held.parameters())], device=processes.device)
    counts = own.new_empty(processes.everyone.size, 1)
    processes.everyone.all_gather(counts, own, purpose="setup")()
    low, high = format_count(int(counts.min())), format_count(int(counts.max()))
    each = low if low == high else f"{low} to {high}"
    line = f"{processes.describe()}; {each} parameters per rank"
    if not isinstance(trainer, Trainer) or trainer.sharding is None:
        return line
    states = sum(parameter.numel() for parameter in trainer.sharding.parameters.values())
    return f"{line}, optimizer states of {format_count(states)} (ZeRO-1 by {parallel.zero_partition})"


def describe_precision(trainer: BaseTrainer) -> list[str]:
    """Lines for the header: exactly what is FP8 and what is not."""
    config, built = trainer.config, trainer.built
    precision = config.precision
    kept = ", of norms and non-linearities kept in e4m3 (1x16)" if precision.activations == "fp8" else ""
    lines = [f"precision: {precision.level}, {precision.compute} activations{kept}; {_others(config)}"]
    rule = trainer.model.parametrization
    if config.parametrization.kind != "standard" or rule.gradient_scale != 1.0:
        fate = "divided out of gradients" if rule.true_gradients else "unit-scale gradients"
        lines.append(
            f"parametrization: {config.parametrization.kind}; mean loss times {rule.gradient_scale:g} in "
            f"backward ({fate})"
        )
    if built.fp8 is None:
        lines.append("FP8: off")
    else:
        recipe = "" if precision.recipe == "current" else f"; recipe {precision.recipe}"
        casts = "" if config.kernels.quantize == "auto" else ", cast by Transformer Engine's quantisers"
        lines.append(f"{built.fp8} [{built.fp8.backend.reason}]{casts}{recipe}")
        lines.append(f"their weights {_weights(config)}; gradients {_gradients(trainer)}; {_states(config)}")
    if isinstance(trainer, Trainer) and trainer.store.released is not None:
        buckets, places = len(trainer.store.buckets), len(trainer.store.lasting)
        lines.append(f"gradients released during backward: {buckets} buckets in the memory of {places}")
    lines.append(f"attention: {built.attention}")
    if built.norm.name != "auto":
        lines.append(f"norms: {built.norm}")
    if config.kernels.multi_tensor != "auto":
        lines.append(f"norms of gradients: {config.kernels.multi_tensor}, in FP32; of FP8 gradients our own")
    if built.compiles:
        lines.append(f"compile: {_compiled(trainer.model)}")
    if isinstance(trainer, Trainer):
        lines += _execution(trainer)
    if isinstance(trainer, DeepSpeedTrainer):
        lines += describe_deepspeed.describe_engine(trainer)
    stored = stored_bytes(trainer)
    whose = "memory" if not _in_stages(trainer) else "memory of this rank's stages"
    return [*lines, f"{whose}: {stored}", f"all in: {stored.all_in()}"]


def _in_stages(trainer: BaseTrainer) -> bool:
    return isinstance(trainer, Trainer) and trainer.pipeline is not None


def _execution(trainer: Trainer) -> list[str]:
    """How this package's own engine runs a step."""
    lines = []
    if trainer.recorded is not None:
        lines.append(f"forward and backward: CUDA graphs, after {WARM_UP} steps without")
    if trainer.processes.device.type != "cpu":
        lines.append(trainer.optimizer.describe_pass())
    if trainer.pipeline is not None:
        lines.append(f"pipeline: {trainer.pipeline.placement.describe()}")
    return lines


def precision_warnings(trainer: BaseTrainer) -> list[str]:
    """What a person should know before they spend the time: decay that rounding takes back."""
    optimizer, specs = trainer.optimizer, trainer.outline.specs.values()
    decays = [optimizer.peak_decay(spec) for spec in specs if in_plan(spec)]
    lost = explain_lost_decay(optimizer.states.plan.master, decays)
    remedy = "to keep it, write precision.state.master.rounding: stochastic"
    return [] if lost is None else [f"precision.state.master.rounding is nearest: {lost}; {remedy}"]


def _others(config: Config) -> str:
    gradient = config.precision.gradient
    wide = "fp64" if config.precision.compute == "fp64" else "fp32"
    whose = "gradients" if gradient.format == "high_precision" else "gradients outside the FP8 plan"
    return (
        f"{whose} accumulated in {gradient.accumulate} and reduced in {gradient.reduce}, "
        f"{config.optimizer.name} states outside the FP8 plan in {wide}"
    )


def _compiled(model: Decoder) -> str:
    blocks = model.held_blocks()
    compiled = sum(block.compiled for block in blocks)
    if compiled == len(blocks):
        return f"{compiled} blocks"
    fused = f"{len(blocks) - compiled} of {len(blocks)} blocks run as fused functions"
    return f"{fused}, which leave nothing to compile"


def _weights(config: Config) -> str:
    resident = config.precision.weights == "fp8"
    return (
        "in FP8 only, cast from the master" if resident else f"in {config.precision.compute}, cast every step"
    )


def _gradients(trainer: BaseTrainer) -> str:
    gradient = trainer.config.precision.gradient
    if gradient.format == "high_precision":
        return "in high precision"
    fp8 = gradient.fp8
    if fp8.reduce == "exact":
        return f"{gradient.format} (one scale per tensor) of each micro-batch, added as integers"
    if fp8.reduce in ("bf16", "fp32") and isinstance(trainer, Trainer) and trainer.sharding is not None:
        return f"accumulated in {fp8.accumulate} and reduced in {fp8.reduce} to their owners, not cast"
    scales = "one scale per tensor" if fp8.reduce == "shared_scale" else f"blocks of up to {fp8.block}"
    return f"{gradient.format} ({scales}), accumulated in {fp8.accumulate}, reduced by {fp8.reduce}"


def _states(config: Config) -> str:
    state = config.precision.state
    roles = rule_named(config.optimizer.name).roles()
    return ", ".join(f"{role} {_format(getattr(state, role))}" for role in roles)


def _format(state: StateFormatConfig) -> str:
    name = f"sqrt({state.format})" if state.sqrt else state.format
    if state.format in ("fp32", "bf16_remainder"):
        return name
    extra: list[str] = [state.granularity] if state.format != "bf16" else []
    extra += ["expanded"] if state.expand else []
    extra += ["stochastic"] if state.rounding == "stochastic" else []
    return f"{name} ({', '.join(extra)})" if extra else name
