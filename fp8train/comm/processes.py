"""Who we are: device, rank, mesh and groups of this process.

torchrun describes the job in environment variables; without them the run is a single process and no process
group exists. The world is one :class:`~torch.distributed.device_mesh.DeviceMesh`; today it has the axis
``dp`` alone. A gloo group carries CPU objects (checkpoint plans, stop flags) beside whatever moves tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fp8train.comm.collectives import CountedGroup
from fp8train.config.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process's place in the job.

    Attributes:
        device: where its tensors live.
        world_size: processes in the job.
        rank: this one's number.
        dp: data-parallel group (device tensors).
        control: gloo group over all ranks for CPU objects; None for a single process.
    """

    device: torch.device
    world_size: int
    rank: int
    dp: CountedGroup
    control: dist.ProcessGroup | None


def world_from_environment() -> tuple[int, int, int, int]:
    """(world size, rank, ranks on this node, rank on this node) as torchrun sets them; (1, 0, 1, 0) without
    it."""
    get = os.environ.get
    return (
        int(get("WORLD_SIZE", "1")),
        int(get("RANK", "0")),
        int(get("LOCAL_WORLD_SIZE", "1")),
        int(get("LOCAL_RANK", "0")),
    )


def choose_device(setting: str, local_rank: int) -> torch.device:
    """The device for ``run.device``.

    Raises:
        ConfigError: ``cuda`` was asked for and is not there, or there are more ranks than devices.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "run.device: cuda, but torch sees no CUDA device; use run.device=cpu or see `fp8train doctor`"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this node has no GPU: torch sees {torch.cuda.device_count()}; "
            "start at most that many ranks"
        )
    return torch.device("cuda", local_rank)


def choose_threads(setting: int | None, local_world_size: int) -> int:
    """CPU threads per rank: ``run.threads``, or the node's usable cores divided by its ranks."""
    return setting or max(1, len(os.sched_getaffinity(0)) // local_world_size)


@contextmanager
def processes(device_setting: str, *, timeout_s: float = 600.0) -> Iterator[Processes]:
    """Join the job that the environment describes, leave it on exit.

    Args:
        device_setting: ``run.device``.
        timeout_s: after this long a collective that some rank never joins fails.
    """
    world_size, _rank, _, local_rank = world_from_environment()
    device = choose_device(device_setting, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Processes(device, 1, 0, CountedGroup(None), None)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield joined_processes(device)
    finally:
        dist.destroy_process_group()


def two_levels(group: CountedGroup, node_size: int) -> tuple[CountedGroup, CountedGroup]:
    """Split a group into nodes of ``node_size`` consecutive ranks.

    Collective over all ranks of the job.

    Returns:
        (the ranks of this node, the ranks of all nodes with this one's place in its node).
    """
    assert group.group is not None
    assert group.size % node_size == 0
    ranks = dist.get_process_group_ranks(group.group)
    nodes = [ranks[start : start + node_size] for start in range(0, len(ranks), node_size)]
    across = [list(place) for place in zip(*nodes, strict=True)]
    local, _ = dist.new_subgroups_by_enumeration(nodes)
    cross, _ = dist.new_subgroups_by_enumeration(across)
    return CountedGroup(local), CountedGroup(cross)


def joined_processes(device: torch.device) -> Processes:
    """The layout inside an already initialised default process group."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    control = dist.new_group(backend="gloo")
    dp = CountedGroup(mesh.get_group("dp"))
    return Processes(device, dist.get_world_size(), dist.get_rank(), dp, control)
