"""Makes, from ``precision`` in the configuration, gradient storage and reduction and the optimizer of one
process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes, two_levels
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.kernels.multi_tensor import choose_multi_tensor
from fp8train.kernels.package_kernels import RunsOn, on_cuda
from fp8train.layers.fp8_weight import ResidentFp8Weight
from fp8train.models.build import BuiltModel
from fp8train.models.decoder import Decoder
from fp8train.numerics.statistics import CastRecorder
from fp8train.optim.copy_queues import copy_queues
from fp8train.optim.host_states import Offload
from fp8train.optim.optimizer import Optimizer
from fp8train.parallel.gradients.gradient_buckets import GradientBuckets, Groups
from fp8train.parallel.gradients.recorder import GradientRecorder
from fp8train.parallel.zero import Partition
from fp8train.step.sharding import Sharding
from fp8train.update_rules.registry import rule_named


def make_gradient_buckets(
    config: Config,
    processes: Processes,
    built: BuiltModel,
    *,
    outline: Decoder | None = None,
    owners: Partition | None = None,
    contributions: int,
    recorder: CastRecorder | None = None,
    runs_on: RunsOn = on_cuda,
) -> GradientBuckets:
    """Decide how this process's gradients are stored and reduced.

    Args:
        config: a validated configuration.
        processes: this process's place in the job.
        built: the model and its FP8 plan.
        outline: the whole model, where ``built`` is a part of it.
        owners: under ZeRO, who keeps the optimizer states of what.
        contributions: micro-batches of a step on this rank.
        recorder: where statistics of gradient casts go, at sites ``PATH/grad_weight``.
        runs_on: where the kernels of other packages run.

    Raises:
        ConfigError: ``exact`` on ranks that differ in what its bits depend on.
        ValueError: the kernels for norms that are asked for do not run here.
    """
    kernels = choose_multi_tensor(
        processes.device, key="multi_tensor", wanted=config.kernels.multi_tensor, runs_on=runs_on
    )
    gradients = config.precision.gradient.value()
    in_fp8 = gradients.format is not None
    exact = in_fp8 and gradients.fp8.reduce == "exact"
    if exact:
        ours = _settings_of_exact(config, processes.device) | _machine(processes.device)
        _check_ranks_agree(ours, processes)
    # Grids are of the whole model on every rank: their state is one tensor, and all ranks agree on it.
    model = outline if exact and outline is not None else built.model
    return GradientBuckets(
        dict(model.named_parameters()),
        gradients,
        groups=_groups(gradients.fp8.node_size if in_fp8 else None, processes),
        device=processes.device,
        agree=processes.stage if processes.pp.size == 1 else processes.everyone,
        in_fp8_plan=() if built.fp8 is None else [f"{path}.weight" for path in built.fp8.converted],
        contributions=contributions,
        recorder=None if recorder is None else GradientRecorder(recorder),
        unchanged=_settings_of_exact(config, processes.device) if exact else None,
        specs=built.model.specs,
        owners=owners,
        norms=None if kernels is None else kernels.norms,
    )


def tensor_parallel(config: Config, processes: Processes) -> TensorParallel | None:
    """The ranks among which matrices and activations are cut; None for one."""
    if processes.sequence.size == 1:
        return None
    traffic = config.precision.traffic.value()
    return TensorParallel(processes.tp, processes.sequence, processes.cp, traffic)


def _groups(node_size: int | None, processes: Processes) -> Groups:
    size = processes.replicas.size
    in_parts = {"parts": processes.tp, "partial": processes.stage} if processes.tp.size > 1 else {}
    if node_size is None or node_size == size:
        return Groups(processes.replicas, **in_parts)
    return Groups(processes.replicas, *two_levels(processes.replicas, node_size), **in_parts)


def _settings_of_exact(config: Config, device: torch.device) -> dict[str, int | str | None]:
    """What the user sets and the bits of a micro-batch's gradient, or their grid, depend on. Threads do not
    count on CUDA. Ranks that hold parts of matrices or sequences round parts of its sums."""
    return {
        "parallel.tp": config.parallel.tp,
        "parallel.cp": config.parallel.cp,
        "run.device": device.type,
        "run.threads": torch.get_num_threads() if device.type == "cpu" else None,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.global_batch_size": config.train.global_batch_size,
    }


def _machine(device: torch.device) -> dict[str, int | str | None]:
    """What of the machine they depend on: the kernels that torch has and chooses."""
    if device.type == "cuda":
        return {"torch version": torch.__version__, "GPU": torch.cuda.get_device_name(device)}
    return {"torch version": torch.__version__, "CPU capability": torch.backends.cpu.get_cpu_capability()}


def _check_ranks_agree(ours: dict[str, int | str | None], processes: Processes) -> None:
    """Collective over all ranks.

    Raises:
        ConfigError: a value is not the same on all of them; on every rank, with the same text.
    """
    if processes.control is None:
        return
    everyone: list[dict[str, int | str | None]] = [{} for _ in range(processes.world_size)]
    dist.all_gather_object(everyone, ours, group=processes.control)
    for key in ours:
        ranks_of: dict[int | str | None, list[int]] = {}
        for rank, values in enumerate(everyone):
            ranks_of.setdefault(values[key], []).append(rank)
        if len(ranks_of) > 1:
            found = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_of.items())
            raise ConfigError(
                "precision.gradient.fp8.reduce: exact needs a micro-batch's gradient to have the same bits "
                f"on every rank, but {key} differs: {found}; make it the same on all"
            )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def make_run_optimizer(
    config: Config,
    built: BuiltModel,
    processes: Processes,
    resident: Mapping[str, ResidentFp8Weight],
    sharding: Sharding | None = None,
    offload: Offload | None = None,
    *,
    runs_on: RunsOn = on_cuda,
) -> Optimizer:
    """The optimizer of a model; it writes the ``resident`` FP8 weights itself. ``offload``: in place of what
    the device has, where ``optimizer.offload`` asks for it; ``runs_on``: where the kernels of other packages
    run.

    Raises:
        ConfigError: state formats that do not fit, or a kernel that does not run here.
    """
    hyperparameters = config.optimizer.model_dump() | {
        "eps": config.optimizer.eps * built.model.parametrization.eps_unit,
        "bounded_update": config.precision.state.bounded_update,
    }
    parameters: Mapping[str, Tensor] = dict(built.model.named_parameters())
    group = processes.tp
    if sharding is not None:
        parameters, group = sharding.parameters, processes.stage
    if config.optimizer.offload == "none":
        offload = None
    elif offload is None:
        shards = 1 if sharding is None else processes.replicas.size
        offload = Offload(copy_queues(processes.device), shards=shards)
    try:
        return Optimizer(
            rule_named(config.optimizer.name).of(hyperparameters),
            parameters,
            built.model.specs,
            config.state_formats,
            seed=config.run.seed,
            weight_targets=resident if sharding is None else sharding.targets,
            regions=None if sharding is None else sharding.regions,
            agree=None if group.size == 1 else partial(all_reduce_max, group),
            device=processes.device,
            multi_tensor=choose_multi_tensor(
                processes.device, key="optimizer", wanted=config.kernels.optimizer, runs_on=runs_on
            ),
            offload=offload,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def all_reduce_max(group: CountedGroup, tensor: Tensor) -> None:
    """The elementwise maximum over ``group``, in place."""
    group.all_reduce(tensor, purpose="amax", op=torch.distributed.ReduceOp.MAX)()
