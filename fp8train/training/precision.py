"""From ``precision`` in the configuration to gradient buckets, optimizer states and scale state of one
process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.comm.processes import Processes, two_levels
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.models.build import COMPUTE_DTYPES, BuiltModel
from fp8train.numerics.formats import format_by_name
from fp8train.numerics.statistics import CastRecorder
from fp8train.optim.adamw import AdamWSettings
from fp8train.optim.from_config import state_plan
from fp8train.optim.make import make_optimizer
from fp8train.optim.optimizer import Optimizer, OptimizerSettings
from fp8train.parallel.gradient_plan import Fp8Gradients, GradientPlan, Groups

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_gradient_plan(
    config: Config,
    processes: Processes,
    built: BuiltModel,
    *,
    contributions: int,
    recorder: CastRecorder | None = None,
) -> GradientPlan:
    """How gradients are stored and reduced.

    Args:
        config: a validated configuration.
        processes: this process's place in the job.
        built: the model and its FP8 plan.
        contributions: micro-batches of a step on this rank.
        recorder: where statistics of gradient casts go, at sites ``PATH/grad_weight``.

    Raises:
        ConfigError: ``node_size`` does not divide the ranks; ``exact`` without what makes it exact.
    """
    gradient = config.precision.gradient
    in_fp64 = COMPUTE_DTYPES[config.precision.compute] == torch.float64
    fp8 = None if gradient.format == "high_precision" else _fp8_gradients(config)
    if fp8 is not None and fp8.reduce == "exact":
        _check_exact(config, processes)
    return GradientPlan(
        dict(built.model.named_parameters()),
        accumulate=torch.float64 if in_fp64 else _DTYPES[gradient.accumulate],
        reduce=torch.float64 if in_fp64 else _DTYPES[gradient.reduce],
        bucket_bytes=gradient.bucket_mib * 2**20,
        groups=_groups(gradient.fp8.node_size if fp8 is not None else None, processes),
        device=processes.device,
        fp8=fp8,
        in_fp8_plan=[fqn for fqn, spec in built.model.specs.items() if spec.in_fp8_plan],
        contributions=contributions,
        recorder=None if recorder is None else _GradientSites(recorder),
    )


@dataclass(frozen=True)
class _GradientSites:
    """Names a gradient's cast site after its linear, as the operands' are."""

    recorder: CastRecorder

    @property
    def active(self) -> bool:
        return self.recorder.active

    def record(self, fqn: str, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        self.recorder.record(f"{fqn.removesuffix('.weight')}/grad_weight", source, payload, scale_inv)


def _fp8_gradients(config: Config) -> Fp8Gradients:
    fp8 = config.precision.gradient.fp8
    fmt = format_by_name(config.precision.gradient.format)
    return Fp8Gradients(
        format=fmt,
        accumulate=fmt.dtype if fp8.accumulate == "fp8" else _DTYPES[fp8.accumulate],
        reduce=_DTYPES[fp8.reduce] if fp8.reduce == "bf16" or fp8.reduce == "fp32" else fp8.reduce,
        block=fp8.block,
        error_feedback=fp8.error_feedback,
        between_nodes=fp8.between_nodes,
        algorithm=fp8.sum,
        mu_criterion=fp8.mu_criterion,
        mu_threshold=fp8.mu_threshold if fp8.mu_criterion == "count" else None,
        mu_window=fp8.mu_window,
    )


def _groups(node_size: int | None, processes: Processes) -> Groups:
    size = processes.dp.size
    if node_size is None or node_size == size:
        return Groups(processes.dp)
    if size % node_size:
        legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError(
            f"precision.gradient.fp8.node_size ({node_size}) must divide the data-parallel ranks ({size}); "
            f"legal: {legal}"
        )
    return Groups(processes.dp, *two_levels(processes.dp, node_size))


def _check_exact(config: Config, processes: Processes) -> None:
    """``exact`` promises equal bits, so everything that a micro-batch's bits depend on must be fixed."""
    if config.precision.gradient.format != "e4m3":
        raise ConfigError(
            "precision.gradient.fp8.reduce: exact counts in units of E4M3; "
            "write precision.gradient.format: e4m3"
        )
    if config.run.threads is None and processes.device.type == "cpu":
        raise ConfigError(
            "precision.gradient.fp8.reduce: exact gives the same bits on any number of ranks only at equal "
            "threads per rank; set run.threads, for example run.threads=1"
        )
    if processes.device.type == "cuda" and not config.run.deterministic:
        raise ConfigError(
            "precision.gradient.fp8.reduce: exact needs kernels whose result does not depend on timing; "
            "set run.deterministic=true"
        )


def make_run_optimizer(config: Config, built: BuiltModel) -> Optimizer:
    """The optimizer of a model; it writes FP8-resident weights itself.

    Raises:
        ConfigError: state formats that do not fit.
    """
    o = config.optimizer
    settings: OptimizerSettings
    if o.name == "adamw":
        settings = AdamWSettings(
            lr=o.lr, beta1=o.beta1, beta2=o.beta2, weight_decay=o.weight_decay, eps=o.eps
        )
    else:
        settings = OptimizerSettings(lr=o.lr, beta1=o.beta1, beta2=o.beta2, weight_decay=o.weight_decay)
    parameters: Mapping[str, nn.Parameter] = dict(built.model.named_parameters())
    try:
        return make_optimizer(
            o.name,
            parameters,
            built.model.specs,
            settings,
            state_plan(config),
            seed=config.run.seed,
            weight_targets=built.weight_targets,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def all_reduce_max(processes: Processes, tensor: Tensor) -> None:
    """The elementwise maximum over all data-parallel ranks, in place."""
    processes.dp.all_reduce(tensor, purpose="amax", op=torch.distributed.ReduceOp.MAX)()
