"""A trained model and its tokenizer from a checkpoint, in the numerics it was trained with.

Weights are the checkpoint's master weights rounded to the compute dtype, or cast to FP8 where training keeps
only that: what training computes with. A model trained with FP8 GEMMs generates with FP8 GEMMs, and with the
delayed scales it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fp8train.checkpoint import find_checkpoint, load_checkpoint, read_meta, verify_checkpoint
from fp8train.checkpoint.catalog import CHECKPOINTS_DIR, candidates, step_of
from fp8train.checkpoint.manifest import MANIFEST_FILE
from fp8train.checkpoint.ranks import Ranks
from fp8train.config.schema import Config
from fp8train.data.tokenizer import Tokenizer, load_tokenizer
from fp8train.inference.errors import InferenceError
from fp8train.models.build import BuiltModel, build_model, make_scale_state
from fp8train.optim.from_config import state_format
from fp8train.optim.master_weights import MasterWeights

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
"""Names under which training leaves the tokenizer in the run directory."""


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to use.

    Attributes:
        built: the decoder with its weights, and how its GEMMs run.
        tokenizer: turns text into its tokens and back.
        config: the run's configuration.
        path: the checkpoint directory.
        step: optimizer steps of training.
    """

    built: BuiltModel
    tokenizer: Tokenizer
    config: Config
    path: Path
    step: int


def resolve_checkpoint(path: Path) -> Path:
    """The verified checkpoint directory behind ``path``.

    Args:
        path: a ``step_XXXXXXXX`` directory, or a run directory or its ``checkpoints`` for the newest good
            one.

    Raises:
        InferenceError: there is no checkpoint.
        CheckpointError: it is damaged.
    """
    if not path.is_dir():
        raise InferenceError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
    if step_of(path) is not None or (path / MANIFEST_FILE).exists():
        verify_checkpoint(path, ranks=Ranks(None), mode="full")
        return path
    root = path / CHECKPOINTS_DIR if (path / CHECKPOINTS_DIR).is_dir() else path
    if not candidates(root):
        raise InferenceError(
            f"{path} holds no checkpoint; give a run directory, its {CHECKPOINTS_DIR} directory or a "
            "step_XXXXXXXX directory"
        )
    found = find_checkpoint(root, "auto")
    assert found is not None, "candidates exist, so there is a good one or an error"
    return found


def load_trained(path: Path, *, device: torch.device) -> TrainedModel:
    """Load a model and its tokenizer.

    Args:
        path: see :func:`resolve_checkpoint`.
        device: where the model goes.

    Raises:
        InferenceError: no checkpoint, or one whose description or tokenizer is missing or does not fit.
        CheckpointError: its files are damaged or are not those of this model.
        DataError: the tokenizer file is damaged.
        UserError: the device cannot run it.
    """
    checkpoint = resolve_checkpoint(path)
    meta = read_meta(checkpoint)
    config, vocab_size = _description(checkpoint, meta)
    tokenizer = load_tokenizer(_tokenizer_file(checkpoint, meta))
    if tokenizer.vocab_size > vocab_size:
        raise InferenceError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model in {checkpoint} knows "
            f"{vocab_size}; it was trained with another tokenizer"
        )
    # Every generated token has another length, and nothing is kept for backward: neither setting would help.
    train = config.train.model_copy(update={"compile": "off", "activation_checkpointing": "none"})
    try:
        built = build_model(config.model_copy(update={"train": train}), vocab_size=vocab_size, device=device)
    except ValueError as error:  # the device cannot multiply in FP8
        raise InferenceError(f"{checkpoint}: {error}") from None
    step = _fill(built, config, checkpoint)
    built.model.requires_grad_(False)
    return TrainedModel(built, tokenizer, config, checkpoint, step)


def _description(checkpoint: Path, meta: dict[str, Any]) -> tuple[Config, int]:
    missing = [key for key in ("config", "vocab_size") if key not in meta]
    if missing:
        raise InferenceError(
            f"{checkpoint}: not a checkpoint of a training run: no {' or '.join(missing)} in it"
        )
    try:
        return Config.model_validate(meta["config"]), int(meta["vocab_size"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InferenceError(
            f"{checkpoint}: its configuration does not fit this version of fp8train: {key}: {first['msg']}"
        ) from None


def _tokenizer_file(checkpoint: Path, meta: dict[str, Any]) -> Path:
    run_dir = checkpoint.resolve().parent.parent
    recorded = meta.get("tokenizer")
    places = [run_dir / name for name in TOKENIZER_FILES] + ([Path(recorded)] if recorded else [])
    for place in places:
        if place.is_file():
            return place
    raise InferenceError(
        f"{checkpoint}: its tokenizer is not at {' nor at '.join(map(str, places))}; "
        f"copy it to {run_dir / TOKENIZER_FILES[0]}"
    )


@torch.no_grad()
def _fill(built: BuiltModel, config: Config, checkpoint: Path) -> int:
    """Write the master weights into the model, rounded to its compute dtype or cast to FP8; returns the
    step."""
    parameters = dict(built.model.named_parameters())
    masters = MasterWeights(parameters, built.model.specs, state_format(config.precision.state.master))
    device = next(iter(parameters.values())).device
    scales = make_scale_state(built.model, device)  # before any weight is written
    tensors = masters.state_tensors() | ({} if scales is None else scales.state_tensors())
    loaded = load_checkpoint(checkpoint, tensors, group=None, verify="size", allow_unexpected=True)
    for fqn, parameter in parameters.items():
        target = built.weight_targets.get(fqn)
        if target is None:
            parameter.copy_(masters.values(fqn))
        else:
            target.fill(masters.values(fqn).to(device))
    return loaded.step
