"""What can be known to be wrong before a process joins others: the one check of ``fp8train train`` and of the
launch scripts.

The packages that it asks for, the world size, the data with its tokenizer, room for the model in memory, the
run directory, and the settings and the data position of the checkpoint that a run continues from. What it
opens, training goes on with, so the check costs nothing twice; and it needs no torch, so that a launcher
answers within a second. What remains for the run itself: the model, the devices, the tensors of a checkpoint
and another job that uses the directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8train.checkpoint.catalog import CHECKPOINTS_DIR, likely_checkpoint
from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import CheckpointError, CorruptCheckpointError
from fp8train.config.argument_keys import naming_keys
from fp8train.config.changes import Change, changes, check_accepted
from fp8train.config.environment import World
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import ResolvedConfig
from fp8train.config.schema import Config
from fp8train.config.world import check_world, model_ranks
from fp8train.data.loading import Data, open_data
from fp8train.deepspeed_engine.settings import further_settings
from fp8train.extensions.check import check_extensions
from fp8train.run_dir.claim import check_claim
from fp8train.training.room import check_room


@naming_keys()
def preflight(resolved: ResolvedConfig, world: World) -> Data:
    """Check a run as far as files and numbers show, on every rank.

    Rank 0 alone looks at the run directory and the checkpoint, and only if its refusal ends the others;
    without a launcher they would wait for it, so there all ranks learn of it together once they have joined.

    Returns:
        The data, opened for this rank and at the position of a new run.

    Raises:
        UserError: anything the user can mend. Nothing was written.
    """
    config = resolved.config
    check_extensions(config)
    further_settings(config)
    dp, micro_batches = check_world(config, world.size, origins=resolved.origins)
    checkpoint = _look_at_run(config) if world.rank == 0 and world.supervised else None
    data = open_data(
        config.data,
        vocab_size=config.model.vocab_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=world.rank // model_ranks(config),
        dp_size=dp,
        seed=config.run.seed,
        total_steps=config.total_steps,
        ramp=config.train.batch_sizes.ramp,
    )
    check_room(config, world, data.vocab_size, dp=dp, micro_batches=micro_batches)
    if config.train.eval_interval and data.valid is None:
        raise ConfigError(
            "train.eval_interval is set but there is no validation data; give data.split a validation share "
            "or set data.valid_prefix"
        )
    if checkpoint is not None:
        _look_at_checkpoint(checkpoint, config, data)
    return data


def run_path(config: Config) -> Path:
    """The run directory."""
    return Path(config.run.dir, config.run.name)


def settings_changes(meta: Mapping[str, Any], config: Config, path: Path) -> list[Change]:
    """What differs between a checkpoint's settings and the run's now, all of it accepted.

    Args:
        meta: the checkpoint's description.
        config: of the run now.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: it holds no state of a training run.
        ConfigError: it belongs to another model, or its settings changed in a way that was not accepted.
    """
    if not {"config", "trainer", "data"} <= meta.keys():
        raise CheckpointError(
            f"{path} holds weights but no state of a training run, so nothing can go on from it; start a new "
            "run from it: checkpoint.init_from"
        )
    found = changes(meta["config"], config)
    check_accepted(found, config.checkpoint.accept_changes, str(path))
    sizes = ("train.global_batch_size", "train.batch_size_ramp")
    counted = [one.key for one in found if one.key in sizes]
    if counted and config.train.tokens is not None:
        raise ConfigError(
            f"{counted[0]} cannot change in a run whose length is train.tokens: its steps, and so its "
            "schedule, would be counted anew; write train.steps instead"
        )
    return found


def _look_at_run(config: Config) -> Path | None:
    """Refuse a run directory that cannot be used; the checkpoint that would be continued from."""
    run, checkpoint = config.run, config.checkpoint
    continued = check_claim(Path(run.dir), run.name, resume=checkpoint.resume, overwrite=run.overwrite)
    own = run_path(config) / CHECKPOINTS_DIR
    found = None
    if continued or checkpoint.resume not in ("auto", "never"):
        found = likely_checkpoint(own, checkpoint.resume)
    if found is None and checkpoint.init_from is not None:
        likely_checkpoint(own, checkpoint.init_from, key="init_from")
    return found


def _look_at_checkpoint(path: Path, config: Config, data: Data) -> None:
    try:
        _, meta = read_meta_file(path)
    except CorruptCheckpointError:  # the run will verify it, and say so or pass it over
        return
    settings_changes(meta, config, path)
    data.train.check_state_dict(meta["data"])
