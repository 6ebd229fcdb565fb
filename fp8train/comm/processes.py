"""Who we are: device, rank, mesh and groups of this process.

torchrun describes the job in environment variables; without them the run is a single process and no process
group exists. The world is one :class:`~torch.distributed.device_mesh.DeviceMesh` with the axes dp, pp, cp,
tp, tp innermost. A gloo group carries CPU objects (checkpoint plans, stop flags) beside whatever moves
tensors.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist

# Its functions take the group of all ranks as a default, of the moment when it is imported. Torch's
# checkpoints import it: if that were after the group is made, it would never be destroyed, nor gloo's threads
# end.
import torch.distributed.nn.functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fp8train.comm.calls import Calls, GroupCalls
from fp8train.comm.collectives import CountedGroup, alone
from fp8train.comm.failures import describe, record
from fp8train.comm.rendezvous import STARTUP_TIMEOUT_S, Peer, meet
from fp8train.config.environment import world_from_environment
from fp8train.config.errors import ConfigError
from fp8train.config.threads import threads_from_environment

AXES = ("dp", "pp", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; the world size is their product."""

    pp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.pp * self.cp * self.tp


@dataclass(frozen=True)
class Processes:
    """This process's place in the job: its device, its rank, and the groups of ranks that it works with.

    Groups along an axis hold the ranks that differ in that axis alone. Groups over several axes:

    Attributes:
        device: where its tensors live.
        world_size: processes in the job.
        rank: this one's number.
        dp: ranks with other samples and the same part of the model.
        pp: ranks with the other stages.
        cp: ranks with other parts of the same sequences.
        tp: ranks with other parts of the same matrices.
        replicas: dp and cp: ranks whose gradients of the same parameters add up.
        sequence: cp and tp: ranks that hold parts of one activation.
        stage: dp, cp and tp: ranks with the same blocks.
        everyone: all ranks.
        control: gloo group over all ranks for CPU objects; None for a single process.
        peers: the process of every rank, as far as they met here.
        calls: what was entered and left of all groups, among them ``control``, as far as agreements in the
            loop go.
    """

    device: torch.device
    world_size: int
    rank: int
    dp: CountedGroup
    control: dist.ProcessGroup | None
    pp: CountedGroup = field(default_factory=alone)
    cp: CountedGroup = field(default_factory=alone)
    tp: CountedGroup = field(default_factory=alone)
    replicas: CountedGroup = field(default_factory=alone)
    sequence: CountedGroup = field(default_factory=alone)
    stage: CountedGroup = field(default_factory=alone)
    everyone: CountedGroup = field(default_factory=alone)
    peers: tuple[Peer, ...] = ()
    calls: Calls = field(default_factory=Calls)

    @cached_property
    def control_calls(self) -> GroupCalls:
        """Collectives over ``control``, counted by those who call them."""
        return self.calls.group("control", range(self.world_size))

    @property
    def groups(self) -> Mapping[str, CountedGroup]:
        """Every group by name; one that several names share appears once, under the first."""
        found: dict[str, CountedGroup] = {}
        for name in (*AXES, "replicas", "sequence", "stage", "everyone"):
            group = getattr(self, name)
            if group.size > 1 and all(group is not other for other in found.values()):
                found[name] = group
        return found

    def describe(self) -> str:
        """The layout in words: ``8 ranks = dp 2 x pp 2 x tp 2``."""
        sizes = [(axis, getattr(self, axis).size) for axis in AXES]
        return f"{self.world_size} ranks = " + " x ".join(f"{a} {n}" for a, n in sizes if n > 1 or a == "dp")


_DATA_PARALLEL = Layout()
_logger = logging.getLogger(__name__)


def choose_device(setting: str, local_rank: int) -> torch.device:
    """The device that ``run.device`` means on this rank.

    Raises:
        ConfigError: ``cuda`` was asked for and is not there, or there are more ranks than devices.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "`device`: cuda, but torch sees no CUDA device; use `device`=cpu or see `fp8train doctor`"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this node has no GPU: torch sees {torch.cuda.device_count()}; "
            "start at most that many ranks"
        )
    return torch.device("cuda", local_rank)


def choose_threads(setting: int | None, local_world_size: int) -> int:
    """CPU threads per rank: ``run.threads``, else ``OMP_NUM_THREADS``, else the node's usable cores divided
    by its ranks.

    Raises:
        ConfigError: the variable is asked and holds no number of threads.
    """
    chosen = setting or threads_from_environment(os.environ)
    return chosen or max(1, len(os.sched_getaffinity(0)) // local_world_size)


@contextmanager
def processes(
    device_setting: str,
    *,
    layout: Layout = _DATA_PARALLEL,
    timeout_s: float = 600.0,
    startup_timeout_s: float = STARTUP_TIMEOUT_S,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Processes]:
    """Join the job that the environment describes, leave it on exit.

    Args:
        device_setting: ``run.device``.
        layout: ranks of a copy of the model; the rest is data-parallel.
        timeout_s: after this long a collective that some rank never joins fails.
        startup_timeout_s: how long to wait until all ranks are there.
        stopping: whether somebody asked this rank to stop meanwhile.

    Raises:
        ConfigError: the ranks did not meet; see :func:`~fp8train.comm.rendezvous.meet`.
        StoppedBeforeMeetingError: stopped before they did.
    """
    world = world_from_environment()
    device = choose_device(device_setting, world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1:
        yield Processes(device, 1, 0, alone(), None)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, peers = meet(world, timeout_s=startup_timeout_s, stopping=stopping)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield replace(joined_processes(device, layout), peers=tuple(peers))
    except BaseException as error:
        record(describe(error))  # before a peer can notice
        raise
    finally:
        _leave_groups()


def _leave_groups() -> None:
    """What this job was for is done or has failed by now, whatever a library says about its end."""
    try:
        dist.destroy_process_group()
    except Exception as error:
        _logger.warning("leaving the process groups: %s: %s", type(error).__name__, error)


def two_levels(group: CountedGroup, node_size: int) -> tuple[CountedGroup, CountedGroup]:
    """Split a group into nodes of ``node_size`` consecutive ranks.

    Collective over the ranks of ``group`` alone: other groups along the same axis do it for themselves.

    Returns:
        (the ranks of this node, the ranks of all nodes with this one's place in its node).
    """
    assert group.group is not None
    assert group.size % node_size == 0
    ranks = dist.get_process_group_ranks(group.group)
    nodes = [ranks[start : start + node_size] for start in range(0, len(ranks), node_size)]
    across = [list(place) for place in zip(*nodes, strict=True)]
    node, place = divmod(group.rank, node_size)
    local = dist.new_group(nodes[node], use_local_synchronization=True)
    cross = dist.new_group(across[place], use_local_synchronization=True)
    calls = group.calls.calls
    return (
        CountedGroup(local, name=f"{group.calls.name} in node", calls=calls),
        CountedGroup(cross, name=f"{group.calls.name} between nodes", calls=calls),
    )


def joined_processes(device: torch.device, layout: Layout = _DATA_PARALLEL) -> Processes:
    """The layout inside an already initialised default process group; collective over all its ranks."""
    world = dist.get_world_size()
    assert world % layout.model_ranks == 0, f"{world} ranks, {layout}"
    shape = (world // layout.model_ranks, layout.pp, layout.cp, layout.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    made: dict[tuple[str, ...], CountedGroup] = {}
    calls = Calls()

    def group(*axes: str) -> CountedGroup:
        """The group over these axes; axes of one rank do not count, so equal groups are one object."""
        wide = tuple(axis for axis in axes if shape[AXES.index(axis)] > 1)
        if wide not in made:
            made[wide] = CountedGroup(_make_group(mesh, wide), name=" x ".join(wide), calls=calls)
        return made[wide]

    return Processes(
        device,
        world,
        dist.get_rank(),
        group("dp"),
        dist.new_group(backend="gloo"),
        pp=group("pp"),
        cp=group("cp"),
        tp=group("tp"),
        replicas=group("dp", "cp"),
        sequence=group("cp", "tp"),
        stage=group("dp", "cp", "tp"),
        everyone=group(*AXES),
        calls=calls,
    )


def _make_group(mesh: DeviceMesh, axes: tuple[str, ...]) -> dist.ProcessGroup | None:
    if not axes:
        return None
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    kept = [i for i, axis in enumerate(AXES) if axis in axes]
    others = [i for i in range(len(AXES)) if i not in kept]
    sets = mesh.mesh.permute(*others, *kept).reshape(-1, math.prod(mesh.mesh.shape[i] for i in kept))
    ranks, _ = dist.new_subgroups_by_enumeration(sets.tolist())
    return ranks
