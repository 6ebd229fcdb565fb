"""Continuing a run from its checkpoint: what must fit, what is read, what starts anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp8train.checkpoint import load_checkpoint, read_meta, restore_rng
from fp8train.comm.processes import Processes
from fp8train.config.errors import ConfigError
from fp8train.config.model_schema import ModelConfig
from fp8train.config.parametrization_schema import ParametrizationConfig
from fp8train.config.schema import Config, to_plain
from fp8train.data.loading import Data
from fp8train.training.reporter import Reporter
from fp8train.training.trainer import Trainer


def resume(
    path: Path, config: Config, *, processes: Processes, trainer: Trainer, data: Data, reporter: Reporter
) -> int:
    """Continue from a verified checkpoint; collective over all ranks.

    Args:
        path: the checkpoint directory.
        config: of the run now.
        processes: this process's place in the job.
        trainer: filled in place.
        data: put at the checkpoint's position.
        reporter: told what happened.

    Returns:
        Steps done.

    Raises:
        ConfigError: it belongs to another architecture or was written with other formats.
        DataError: it belongs to other data.
        CheckpointError: its files do not fit.
    """
    meta = read_meta(path)
    _check_same_model(meta["config"], to_plain(config), path)
    try:
        trainer.check_meta(meta["trainer"])
    except ValueError as error:
        raise ConfigError(f"checkpoint {path}: {error}") from None
    loaded = load_checkpoint(path, trainer.checkpoint_tensors(), group=processes.control, verify="size")
    step = data.train.load_state_dict(loaded.meta["data"])
    trainer.restored(loaded.meta["trainer"])
    if loaded.rank_state is not None:
        restore_rng(loaded.rank_state, processes.device)
        for name, tensor in trainer.rank_tensors().items():
            tensor.copy_(loaded.rank_state[name])
    else:
        reporter.say(
            f"checkpoint was saved by {loaded.world_size} ranks: random states start anew "
            "(weights and data order do not depend on them)"
        )
    reporter.event("resumed", step=step, checkpoint=str(path))
    reporter.say(f"resumed from {path} at step {step}")
    return step


def _check_same_model(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to continue a model of another shape, parametrisation or compute type. Settings that a
    checkpoint does not know yet had their defaults."""
    differing = []
    for name, section in (("model", ModelConfig), ("parametrization", ParametrizationConfig)):
        before, defaults = saved.get(name, {}), section.model_fields
        for key, value in now[name].items():
            old = before.get(key, defaults[key].default)
            if old != value and key not in ("init_std",):
                differing.append(f"{name}.{key}: {old} -> {value}")
    if saved["precision"]["compute"] != now["precision"]["compute"]:
        differing.append(
            f"precision.compute: {saved['precision']['compute']} -> {now['precision']['compute']}"
        )
    if differing:
        listed = "; ".join(differing[:6])
        raise ConfigError(
            f"checkpoint {path} holds another model (saved -> now): {listed}\n"
            "restore these settings, or start a new run under another run.name"
        )
