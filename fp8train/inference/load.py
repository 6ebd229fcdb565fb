"""A trained model and its tokenizer from a checkpoint, of whatever layout, in one process.

:func:`open_run` finds and verifies the checkpoint and reads its description; the model itself is loaded
separately (:meth:`TrainedRun.load`), in the numerics it was trained with or in BF16
(:mod:`fp8train.inference.weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fp8train.checkpoint.catalog import CHECKPOINTS_DIR, candidates, find_checkpoint, step_of, verify_given
from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.manifest import MANIFEST_FILE, read_manifest
from fp8train.checkpoint.ranks import Ranks
from fp8train.config.places import WHAT_TO_GIVE, no_checkpoint_at
from fp8train.config.schema import Config
from fp8train.config.stored import stored_config
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.tokenizer import Tokenizer
from fp8train.inference.errors import InferenceError
from fp8train.inference.stored_states import StoredStates
from fp8train.inference.weights import Numerics, build_trained
from fp8train.models.build import BuiltModel

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
"""Names under which training leaves the tokenizer in the run directory."""


@dataclass(frozen=True)
class TrainedRun:
    """A verified checkpoint, with what its run's description says of it.

    Attributes:
        path: the checkpoint directory.
        step: optimizer steps of training.
        config: the run's configuration.
        vocab_size: tokens that the model knows.
        recorded_tokenizer: where the tokenizer was when the run started; None without one.
    """

    path: Path
    step: int
    config: Config
    vocab_size: int
    recorded_tokenizer: Path | None

    def states(self) -> StoredStates:
        """Open the checkpoint, to read its states one by one."""
        return StoredStates(self.config, self.vocab_size, self.path)

    def load(self, numerics: Numerics, *, device: torch.device) -> BuiltModel:
        """Load the model with its weights, ready to run forward.

        Args:
            numerics: ``matched`` or ``bf16``, see :mod:`fp8train.inference.weights`.
            device: where the model goes.

        Raises:
            InferenceError: the device cannot run it.
            CheckpointError: the checkpoint's files are not those of this model.
        """
        try:
            return build_trained(self.states(), numerics=numerics, device=device)
        except ValueError as error:  # the device cannot multiply in FP8
            raise InferenceError(f"{self.path}: {error}; or use --numerics bf16") from None

    def describe(self, numerics: Numerics, built: BuiltModel) -> str:
        """How ``built``, loaded with ``numerics``, multiplies: for the terminal."""
        if built.fp8 is not None:
            precision = self.config.precision
            preset = f"profile {precision.profile}" if precision.profile != "default" else precision.recipe
            return f"{built.fp8}; scales as trained ({preset})"
        if self.config.precision.gemm.fp8:
            return "bf16 operands; trained in FP8"
        compute = self.config.precision.compute
        used = compute if numerics == "matched" else "bf16"
        return f"{used} operands; trained without FP8 in {compute}"

    def tokenizer_file(self) -> Path | None:
        """The tokenizer in the run directory, else where it was; None if it is at neither place."""
        return next((place for place in self._tokenizer_places() if place.is_file()), None)

    def tokenizer(self) -> Tokenizer:
        """Turns text into the model's tokens and back.

        Raises:
            InferenceError: it is missing or has more tokens than the model.
            DataError: its file is damaged.
        """
        file = self.tokenizer_file()
        if file is None:
            places = self._tokenizer_places()
            raise InferenceError(
                f"{self.path}: its tokenizer is not at {' nor at '.join(map(str, places))}; "
                f"copy it to {places[0]}"
            )
        tokenizer = load_tokenizer(file)
        if tokenizer.vocab_size > self.vocab_size:
            raise InferenceError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model in {self.path} knows "
                f"{self.vocab_size}; it was trained with another tokenizer"
            )
        return tokenizer

    def _tokenizer_places(self) -> list[Path]:
        run_dir = self.path.resolve().parent.parent
        recorded = [] if self.recorded_tokenizer is None else [self.recorded_tokenizer]
        return [run_dir / name for name in TOKENIZER_FILES] + recorded


def resolve_checkpoint(path: Path) -> Path:
    """Find the checkpoint directory that ``path`` means, and verify it.

    Args:
        path: a ``step_XXXXXXXX`` directory, or a run directory or its ``checkpoints`` for the newest good
            one.

    Raises:
        InferenceError: there is no checkpoint.
        CheckpointError: it is damaged.
    """
    if problem := no_checkpoint_at(path):
        raise InferenceError(problem)
    if step_of(path) is not None or (path / MANIFEST_FILE).exists():
        verify_given(path, Ranks(None), "full")
        return path
    root = path / CHECKPOINTS_DIR if (path / CHECKPOINTS_DIR).is_dir() else path
    if not candidates(root):
        raise InferenceError(f"{path} holds no checkpoint; {WHAT_TO_GIVE}")
    found = find_checkpoint(root, "auto")
    assert found is not None, "candidates exist, so there is a good one or an error"
    return found


def open_run(path: Path) -> TrainedRun:
    """Find, verify and describe a checkpoint.

    Args:
        path: see :func:`resolve_checkpoint`.

    Raises:
        InferenceError: no checkpoint, or one without a description that fits.
        CheckpointError: its files are damaged.
    """
    checkpoint = resolve_checkpoint(path)
    _, meta = read_meta_file(checkpoint)
    config, vocab_size = _description(checkpoint, meta)
    recorded = meta.get("tokenizer")
    step = read_manifest(checkpoint).step
    return TrainedRun(checkpoint, step, config, vocab_size, Path(recorded) if recorded else None)


def _description(checkpoint: Path, meta: dict[str, Any]) -> tuple[Config, int]:
    missing = [key for key in ("config", "vocab_size") if key not in meta]
    if missing:
        raise InferenceError(
            f"{checkpoint}: not a checkpoint of a training run: no {' or '.join(missing)} in it"
        )
    try:
        return stored_config(meta["config"]), int(meta["vocab_size"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InferenceError(
            f"{checkpoint}: its configuration does not fit this version of fp8train: {key}: {first['msg']}"
        ) from None
