"""Do ranks that should hold equal tensors hold equal bits?

A flipped bit, a driver bug or a collective that some rank skipped makes replicas drift apart silently: losses
stay plausible while the run is lost. Every ``train.consistency_interval`` steps each rank hashes every tensor
that others hold too (weights over data- and context-parallel ranks, norms and other whole parameters also
over tensor-parallel ranks, scale state) and the hashes are compared. The message names rank and tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.config.errors import UserError
from fp8train.step.base_trainer import BaseTrainer

_MULTIPLIER = 6364136223846793005  # Knuth's MMIX generator; odd, so no factor of 2^64 is lost
_CHUNK = 1 << 20


class InconsistentError(UserError):
    """Replicas differ; the last checkpoint may hold the damage already."""

    exit_status = 4


def fingerprint(x: Tensor) -> Tensor:
    """64 bits of a tensor's bytes and their places; int64 scalar on its device, no host sync."""
    data = x.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, data.numel(), _CHUNK):
        part = data[start : start + _CHUNK].to(torch.int64) + 1
        place = torch.arange(start + 1, start + 1 + len(part), device=x.device)
        # Wraps modulo 2^64; the shift brings high bits of the product, which depend on all of place, down.
        weight = place * _MULTIPLIER
        total += (part * (weight ^ (weight >> 29) | 1)).sum()
    return total


def replicated_tensors(trainer: BaseTrainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what data- and context-parallel ranks share, what tensor-parallel ranks share too), by name."""
    model, linears = trainer.model, trainer.model.linears()
    shared: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for fqn, parameter in trainer.replicated_parameters():
        linear = linears.get(fqn.removesuffix(".weight"))
        tensor = parameter if linear is None or not linear.fp8_weight_is_resident else linear.fp8_codes()
        shared[fqn] = tensor
        if model.specs[fqn].shard is None:
            whole[fqn] = tensor
    if trainer.scales is not None:
        whole["scale state: scales"] = shared["scale state: scales"] = trainer.scales.scales
        whole["scale state: amax history"] = trainer.scales.amax_history
    for name, linear in linears.items():
        if linear.fp8_weight_is_resident:
            whole[f"{name}.weight: scale"] = shared[f"{name}.weight: scale"] = linear.fp8_scale_inv()
    return shared, whole


def check_replicas(trainer: BaseTrainer) -> None:
    """Compare; every rank calls it, outside a step.

    Raises:
        InconsistentError: on every rank of a group whose members differ.
    """
    shared, whole = replicated_tensors(trainer)
    _compare(trainer.processes.replicas, shared, "data-parallel")
    _compare(trainer.processes.tp, whole, "tensor-parallel")


def _compare(group: CountedGroup, tensors: Mapping[str, Tensor], axis: str) -> None:
    if group.size == 1:
        return
    own = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    table = own.new_empty(group.size, len(own))
    group.all_gather(table, own, purpose="check")()
    if (table == table[0]).all():
        return
    names, majority = list(tensors), table.mode(dim=0).values
    differ = (table != table[0]).any(dim=0)
    if (2 * (table == majority).sum(dim=0) <= group.size)[differ].any():
        which = differ.nonzero().flatten().tolist()
        more = f" and {len(which) - 1} more" if len(which) > 1 else ""
        raise InconsistentError(
            f"tensors that must be equal on all {axis} ranks are not: {names[which[0]]}{more}; no majority "
            f"of the {group.size} ranks agrees, so it cannot be told which are wrong\n"
            "a bit flipped or a collective went wrong; resume from a checkpoint of before, and watch the "
            "machines of these ranks"
        )
    odd = {rank: (row != majority).nonzero().flatten().tolist() for rank, row in enumerate(table)}
    found = [
        f"{axis} rank {rank}: {names[which[0]]}" + (f" and {len(which) - 1} more" if len(which) > 1 else "")
        for rank, which in odd.items()
        if which
    ]
    raise InconsistentError(
        f"tensors that must be equal on all {axis} ranks are not: {'; '.join(found)}\n"
        "a bit flipped or a collective went wrong; resume from a checkpoint of before, and watch that rank's "
        "machine"
    )
