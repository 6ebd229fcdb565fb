"""Continuing a run from its checkpoint: what must fit, what may have changed, what starts anew.

The order of trouble: nothing is read before the configurations, the reduction's promises and the data are
known to fit, and every difference is told. What means something for one layout alone (random states,
residuals of error feedback) is taken over on the same layout only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fp8train.checkpoint.load import OpenCheckpoint, open_checkpoint
from fp8train.checkpoint.rng import restore_rng
from fp8train.config.changes import is_in, listed
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.parallel.gradients.gradient_buckets import RESIDUAL_PREFIX
from fp8train.step.base_trainer import BaseTrainer
from fp8train.training.preflight import settings_changes
from fp8train.training.ready_run import ReadyRun
from fp8train.training.restore import Restored, restore


def resume(run: ReadyRun, path: Path) -> int:
    """Continue from a verified checkpoint; collective over all ranks.

    Args:
        run: its trainer is filled in place, its data put at the checkpoint's position, its reporter told.
        path: the checkpoint directory.

    Returns:
        Steps done.

    Raises:
        ConfigError: it belongs to another model, or its settings changed in a way that was not accepted.
        DataError: it belongs to other data.
        CheckpointError: its files do not fit.
    """
    config, trainer, reporter = run.config, run.trainer, run.reporter
    opened = open_checkpoint(path, group=run.processes.control, verify="size")
    found = settings_changes(opened.meta, config, path)
    _check_trainer(trainer, opened.meta["trainer"], path)
    step, restored, anew = fill(run, opened)
    reporter.event(
        "resumed",
        step=step,
        checkpoint=str(path),
        changes={change.key: [change.before, change.now] for change in found},
        recast=restored.recasts,
        fresh=restored.fresh,
    )
    if found:
        reporter.say(f"changed since the checkpoint: {listed(found)}")
    for line in (*restored.lines(), *anew):
        reporter.say(line)
    reporter.say(f"resumed from {path} at step {step}")
    return step


def fill(run: ReadyRun, opened: OpenCheckpoint) -> tuple[int, Restored, list[str]]:
    """Put trainer, data and random states where a checkpoint has them; collective over all ranks.

    Returns:
        Steps done, what changed on the way, and what starts anew, in words.
    """
    config, trainer, meta = run.config, run.trainer, opened.meta
    step = run.data.train.load_state_dict(meta["data"])
    own = _rank_state(opened, config)
    restored = restore(
        trainer,
        opened,
        roles=trainer.optimizer.states.roles,
        scales=True,
        reshard=config.checkpoint.reshard,
        rank_state=own,
    )
    trainer.restored(meta["trainer"])
    return step, restored, _restore_own(own, opened, trainer)


def _check_trainer(trainer: BaseTrainer, meta: dict[str, Any], path: Path) -> None:
    try:
        trainer.check_meta(meta, lambda key: is_in(key, trainer.config.checkpoint.accept_changes))
    except ValueError as error:
        raise ConfigError(f"checkpoint {path}: {error}") from None


def _rank_state(opened: OpenCheckpoint, config: Config) -> dict[str, Tensor] | None:
    """Empty tensors for what this rank saved, if it has the same place in the same layout."""
    saved = opened.meta["config"].get("parallel", {})
    now = config.parallel.model_dump(mode="json")
    same = all(saved.get(key, now[key]) == now[key] for key in now if key != "dp")
    return opened.rank_state() if same else None


def _restore_own(own: Mapping[str, Tensor] | None, opened: OpenCheckpoint, trainer: BaseTrainer) -> list[str]:
    """Put back what is this rank's alone; what starts anew or is lost instead, in words."""
    residuals = trainer.rank_tensors()
    saved = any(name.startswith(RESIDUAL_PREFIX) for name in opened.rank_state_names())
    if own is None:
        lost = ", residuals of error feedback" if saved or residuals else ""
        return [f"another layout: random states{lost} start anew (weights and data order do not need them)"]
    restore_rng(dict(own), trainer.processes.device)
    if not trainer.keeps_residuals:  # not: none here, for a stage may have no linear in FP8
        return ["residuals of error feedback are dropped: this run has none"] if saved else []
    fits = all(name in own and own[name].shape == tensor.shape for name, tensor in residuals.items())
    if not fits or len(residuals) != sum(name.startswith(RESIDUAL_PREFIX) for name in own):
        return ["residuals of error feedback start anew"]
    for name, tensor in residuals.items():
        tensor.copy_(own[name])
    return []
