"""Fills a trainer's states from a checkpoint of any layout, level and recipe, and says what had to change.

A state in the run's own format is copied. One in another format is recast, parameter by parameter, each rank
its part (:mod:`fp8train.optim.checkpoint_states`). Scale state (amax histories, auto-scaling factors, grids)
is taken over by name where it means the same in this run; what is not starts as in a new run, which every
recipe can. Nothing is touched before all ranks know that everything fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fp8train.checkpoint.errors import CheckpointError, shorten
from fp8train.checkpoint.load import OpenCheckpoint
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.config.schema import to_plain
from fp8train.optim.checkpoint_states import Part, Recast, announce, plan_load, recast, state_names
from fp8train.step.base_trainer import BaseTrainer

ROLES = ("master", "exp_avg", "exp_avg_sq")
_DELAYED = "scale_state/"
_SCALES = {"mu/": "auto-scaling factors", "exact/": "grids of exact sums", _DELAYED: "delayed scales"}


@dataclass(frozen=True)
class Restored:
    """What a load did beyond copying; the same on all ranks.

    Attributes:
        recasts: ``ROLE: FORMAT -> FORMAT`` and the parameters it happened to.
        fresh: scale state that starts anew, by kind: how many tensors.
    """

    recasts: Mapping[str, Sequence[str]]
    fresh: Mapping[str, int]

    def lines(self) -> list[str]:
        """Say, for the console, what was recast and what starts anew."""
        lines = [
            f"recast {change} ({len(fqns)} parameters: {', '.join(fqns[:2])}{', ..' if fqns[2:] else ''})"
            for change, fqns in self.recasts.items()
        ]
        return lines + [f"{kind} start anew ({count} tensors)" for kind, count in self.fresh.items()]


@dataclass(frozen=True)
class _Finding:
    """What one rank will do."""

    problems: list[str]
    recasts: list[Recast]
    fresh: list[str]


def restore(
    trainer: BaseTrainer,
    opened: OpenCheckpoint,
    *,
    roles: tuple[str, ...],
    scales: bool,
    reshard: Literal["refuse", "requantise"],
    rank_state: Mapping[str, Tensor] | None = None,
) -> Restored:
    """Fill ``trainer`` in place; :meth:`BaseTrainer.restored` must follow. Collective over all ranks.

    Args:
        trainer: of the run.
        opened: the checkpoint.
        roles: states to take; the others stay as they are.
        scales: take scale state too.
        reshard: ``checkpoint.reshard``.
        rank_state: tensors of this rank alone, filled too.

    Raises:
        CheckpointError: a state is missing or has another shape; blocks differ and ``reshard`` is
            ``refuse``.
    """
    ranks, stored = opened.ranks, opened.tensors
    plan = plan_load(trainer.optimizer.states, stored, roles=roles, roots=_roots(opened.meta))
    taken = _same_scales(trainer, opened) if scales else {}
    fresh = [name for name in trainer.scale_tensors() if name not in taken] if scales else []
    findings = ranks.each(lambda: _Finding(plan.problems, plan.recasts, fresh))
    recasts = list(dict.fromkeys(one for finding in findings for one in finding.recasts))
    _refuse(opened, [line for finding in findings for line in finding.problems])
    if reshard == "refuse":
        _refuse_other_blocks(opened, [one for one in recasts if one.only_blocks_differ])

    ours = trainer.checkpoint_tensors()
    converted = {name for one in recasts for name in state_names(stored, one.role, one.fqn)}
    opened.load(
        {name: ours[name] for name in plan.equal} | taken,
        rank_state=rank_state,
        unwanted=lambda name: name in converted or not name.startswith(tuple(f"{r}/" for r in roles)),
    )

    def read(parts: Mapping[str, Part]) -> None:
        opened.read({name: LogicalTensor(*part) for name, part in parts.items()})

    amaxes = ranks.agree(lambda: announce(trainer.optimizer.states, plan.recasts, read))
    for role in [r for r in roles if any(one.role == r and one.now.two_pass for one in recasts)]:
        amaxes[role] = dict(trainer.optimizer.agreement.agreed(amaxes.get(role, {})))
    ranks.agree(lambda: recast(trainer.optimizer.states, plan.recasts, read, amaxes))
    return Restored(_by_change(recasts), _by_kind({name for f in findings for name in f.fresh}))


def _roots(meta: Mapping[str, Any]) -> dict[str, bool]:
    """Which roles are stored as roots: the one thing about a format that a checkpoint's index does not
    show."""
    states = meta.get("config", {}).get("precision", {}).get("state", {})
    return {role: bool((states.get(role) or {}).get("sqrt", False)) for role in ROLES}


def _same_scales(trainer: BaseTrainer, opened: OpenCheckpoint) -> dict[str, Tensor]:
    """Scale state that the checkpoint has and that means the same here."""
    stored = opened.tensors
    saved, now = _operands(opened.meta.get("config", {})), _operands(to_plain(trainer.config))
    return {
        name: tensor
        for name, tensor in trainer.scale_tensors().items()
        if name in stored
        and stored[name] == (tuple(tensor.shape), tensor.dtype)
        and (not name.startswith(_DELAYED) or saved.get(_use(name)) == now.get(_use(name)))
    }


def _use(name: str) -> str:
    """Of ``scale_state/KIND/FQN/USE`` the operand use, such as ``output.x``."""
    return name.rpartition("/")[2]


def _operands(config: Mapping[str, Any]) -> dict[str, Any]:
    """How each operand use is cast."""
    gemm = config.get("precision", {}).get("gemm", {})
    sections = {name: value for name, value in gemm.items() if isinstance(value, dict)}
    return {f"{name}.{operand}": cast for name, uses in sections.items() for operand, cast in uses.items()}


def _refuse(opened: OpenCheckpoint, problems: Iterable[str]) -> None:
    lines = list(dict.fromkeys(problems))
    if lines:
        raise CheckpointError(f"{opened.path} does not fit this run:\n{shorten(lines)}")


def _refuse_other_blocks(opened: OpenCheckpoint, recasts: Sequence[Recast]) -> None:
    if recasts:
        one = recasts[0]
        others = f" and {len(recasts) - 1} other states" if recasts[1:] else ""
        raise CheckpointError(
            f"{opened.path}: {one.role}/{one.fqn}{others}: stored in blocks of {one.stored.block} elements "
            f"that share a scale, but this layout has blocks of {one.now.block}\n"
            "keep the parallel.tp that wrote it, or let the states be rounded once more: "
            "checkpoint.reshard=requantise"
        )


def _by_change(recasts: Iterable[Recast]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in recasts:
        found.setdefault(f"{one.role}: {one}", []).append(one.fqn)
    return found


def _by_kind(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        kind = next(kind for prefix, kind in _SCALES.items() if name.startswith(prefix))
        found[kind] = found.get(kind, 0) + 1
    return found
