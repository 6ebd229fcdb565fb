"""A new run that starts from a checkpoint's weights, or from its optimizer too.

Any checkpoint of ours will do, of any layout and formats, also one that holds only weights (an import). The
run itself is new: step 0, its own schedule, its own order of samples.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.load import open_checkpoint
from fp8train.config.changes import changes, is_in, listed
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.data.tokenizer import Tokenizer
from fp8train.inference.load import TOKENIZER_FILES
from fp8train.live.reporter import Reporter
from fp8train.training.ready_run import ReadyRun
from fp8train.training.restore import restore

_MAY_DIFFER = ("model.family", "model.vocab_size", "model.vocab_multiple", "model.init_std")
"""Of the model: names and sizes whose effect shows in the shapes of the weights."""
_ATTENTION_LENGTH = "parametrization.attention_length"


def initialise_from(run: ReadyRun, path: Path) -> None:
    """Take weights (``init_mode: model``), or moments and count of updates too (``warm``), from a verified
    checkpoint; collective over all ranks.

    Args:
        run: its trainer is filled in place, its reporter told, also if its data has another tokenizer than
            the weights were trained with.
        path: the checkpoint directory.

    Raises:
        ConfigError: the weights belong to another model or parametrisation; ``warm`` from another optimizer.
        CheckpointError: it lacks what is asked for, or shapes differ.
    """
    config, trainer, reporter = run.config, run.trainer, run.reporter
    opened = open_checkpoint(path, group=run.processes.control, verify="size")
    warm = config.checkpoint.init_mode == "warm"
    _check_same_model(opened.meta.get("config"), config, path)
    if warm and "trainer" not in opened.meta:
        raise CheckpointError(
            f"checkpoint.init_from: {path} holds no optimizer states; write checkpoint.init_mode: model"
        )
    if warm:
        try:
            trainer.check_rule(opened.meta["trainer"])
        except ValueError as error:
            raise ConfigError(
                f"checkpoint.init_from: {path}: {error}, or take the weights alone: "
                "checkpoint.init_mode=model"
            ) from None
    restored = restore(
        trainer,
        opened,
        roles=trainer.optimizer.states.roles if warm else ("master",),
        scales=False,
        reshard=config.checkpoint.reshard,
    )
    trainer.restored({"updates": opened.meta["trainer"]["updates"] if warm else 0})
    reporter.event(
        "initialised",
        step=0,
        checkpoint=str(path),
        mode=config.checkpoint.init_mode,
        recast=restored.recasts,
    )
    for line in restored.lines():
        reporter.say(line)
    what = "weights and moments" if warm else "weights"
    reporter.say(f"{what} taken from {path} (step {opened.manifest.step}); training starts at step 0")
    _compare_tokenizers(path, run.data.tokenizer, reporter)


def _compare_tokenizers(path: Path, tokenizer: Tokenizer | None, reporter: Reporter) -> None:
    """Equal sizes hide that every row of the embedding means another token."""
    folder = path.resolve().parent.parent
    files = [file for name in TOKENIZER_FILES if (file := folder / name).is_file()]
    if tokenizer is None or not files:
        return
    before = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if before != tokenizer.sha256:
        reporter.warn(
            f"checkpoint.init_from: the weights were trained with the tokenizer {files[0]} (sha256 "
            f"{before[:12]}), the data was made with another, {tokenizer.path} ({tokenizer.sha256[:12]}); "
            f"unless that is meant, make it again: fp8train data prepare --tokenizer {files[0]}"
        )


def _check_same_model(saved: dict | None, config: Config, path: Path) -> None:
    """A model of another kind could have weights of the same shapes."""
    if saved is None:
        return
    found = [
        change
        for change in changes(saved, config)
        if is_in(change.key, ("model", "parametrization"))
        and not is_in(change.key, _MAY_DIFFER)
        and not (change.key == "model.max_seq_len" and config.model.positions == "rope")
        and change.key != _ATTENTION_LENGTH
    ]
    if found:
        raise ConfigError(
            f"checkpoint.init_from: {path} holds another model (saved -> now): {listed(found)}\n"
            "write the model and parametrisation that it was trained with"
        )
    _check_same_attention(saved, config, path)


def _check_same_attention(saved: dict, config: Config, path: Path) -> None:
    """With unit scaling, attention's factor depends on a length of sequences, which the data may change."""
    if config.parametrization.kind not in ("unit_scaling", "umup"):
        return
    before = saved["parametrization"].get("attention_length") or saved["data"]["seq_length"]
    now = config.parametrization.attention_length or config.data.seq_length
    if before != now:
        raise ConfigError(
            f"checkpoint.init_from: attention in {path} has its factor for sequences of {before} tokens, "
            f"this run's would be for {now}; write {_ATTENTION_LENGTH}: {before}"
        )
