"""``fp8train import hf``: a folder of transformers becomes a run directory with a checkpoint of step 0.

Tensors are read, arranged as ours are and written one at a time, so memory is bounded by the largest; the
parity check, which needs both models whole, can be left out. The run directory appears by a rename, complete
and checked, or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8train.checkpoint.catalog import CHECKPOINTS_DIR
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.save import save_checkpoint
from fp8train.config.model_schema import ModelConfig
from fp8train.config.schema import Config, to_plain
from fp8train.huggingface.architecture import Architecture, TensorMap
from fp8train.huggingface.config_json import read_config
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.files import FLOATING, WeightFiles
from fp8train.huggingface.find_architecture import architecture_of_config
from fp8train.huggingface.output import new_folder, read_text
from fp8train.huggingface.parity import (
    Parity,
    check_passed,
    compare,
    decoder_in_fp32,
    their_logits,
    wants_check,
)
from fp8train.huggingface.tokenizer_files import import_tokenizer
from fp8train.huggingface.train_file import TRAIN_FILE, imported_config, write_train_file
from fp8train.inference.load import open_run
from fp8train.models.shapes import parameter_shapes


def import_command(folder: Path, *, output: Path, check: bool | None, text: Path | None) -> int:
    """Import a model of transformers, compare the two, and report.

    Args:
        folder: with config.json and safetensors.
        output: run directory to make; absent or empty.
        check: compare with transformers; None: where it is installed.
        text: file whose perplexity is compared.

    Returns:
        Exit status 0.

    Raises:
        UserError: the model cannot be expressed, its files are not what they should be, or the imported model
            computes something else.
    """
    checked = wants_check(check, text)
    began = time.perf_counter()
    config_json = read_config(folder)
    architecture = architecture_of_config(config_json)
    settings = architecture.settings(config_json)
    config = imported_config(settings, str(config_json.path))
    with new_folder(output) as run_dir:
        parameters, told = _write_run(folder, run_dir, architecture, settings, config, final=output)
        print(
            f"{architecture.name} from {folder}: {parameters:,} parameters -> {output}, "
            f"{time.perf_counter() - began:.1f} s"
        )
        print(told)
        if unread := config_json.unread():
            print(f"without meaning to transformers' class, so to none here: {', '.join(unread)}")
        if checked:
            parity = check_import(folder, run_dir, text=text)
            check_passed(parity, "nothing was imported")
            print("\n".join(parity.lines()), flush=True)
    print(f"continue its training: fp8train train {output / TRAIN_FILE}")
    return 0


def _write_run(
    folder: Path,
    run_dir: Path,
    architecture: Architecture,
    settings: dict[str, Any],
    config: Config,
    *,
    final: Path,
) -> tuple[int, str]:
    """The run directory's content; returns the number of parameters and what to tell."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    tokenizer, told = import_tokenizer(folder, run_dir, vocab_size=vocab_size, final=final)
    shapes = parameter_shapes(config.model, vocab_size)
    maps = architecture.tensors(config.model)

    def lazy(tensor: TensorMap) -> LogicalTensor:
        """One of our parameters from their file, FP32, read when it is its turn to be written."""
        shape = shapes[tensor.ours]

        def read() -> Tensor:
            theirs = [files.read(names[name]).float() for name in tensor.theirs]
            return tensor.arrangement.to_ours(theirs, shape)

        return LogicalTensor(torch.empty(shape, device="meta"), shape, (0,) * len(shape), read)

    with WeightFiles(folder) as files:
        names = match(files, architecture, maps, shapes, config.model)
        save_checkpoint(
            run_dir / CHECKPOINTS_DIR,
            0,
            {f"master/{one.ours}": lazy(one) for one in maps},
            meta={
                "config": to_plain(config),
                "vocab_size": vocab_size,
                "tokenizer": None if tokenizer is None else str(final / tokenizer),
            },
            rank_state={},
            group=None,
            keep_last=1,
        )
        parameters = sum(math.prod(files.shape(name)) for name in names.values())
    write_train_file(
        run_dir / TRAIN_FILE,
        settings,
        name=architecture.name,
        source=folder,
        final=final,
        tokenizer=tokenizer,
    )
    return parameters, told


def match(
    files: WeightFiles,
    architecture: Architecture,
    maps: Sequence[TensorMap],
    shapes: dict[str, tuple[int, ...]],
    model: ModelConfig,
) -> dict[str, str]:
    """Names in the file of every tensor of the model.

    Returns:
        ``{name in the map: name in the file}``.

    Raises:
        HuggingFaceError: tensors are missing, superfluous, quantised, or of another shape than config.json
            says.
    """
    bare = not any(name.startswith(architecture.base_prefix) for name in files.names)
    names: dict[str, str] = {}
    problems: list[str] = []
    for tensor in maps:
        for name, shape in zip(tensor.theirs, tensor.arrangement.shapes(shapes[tensor.ours]), strict=True):
            stored = name.removeprefix(architecture.base_prefix) if bare else name
            if stored not in files.names:
                stored = architecture.aliases.get(stored, stored)
            names[name] = stored
            if stored not in files.names:
                problems.append(f"{stored} is missing")
            elif files.shape(stored) != shape:
                problems.append(f"{stored} is {list(files.shape(stored))}, config.json says {list(shape)}")
            elif files.dtype(stored) not in FLOATING:
                problems.append(f"{stored} is {files.dtype(stored)}, not a floating-point number")
    rest = files.names - set(names.values())
    rest = {name for name in rest if not name.endswith(architecture.buffers)}
    if model.tie_embeddings:
        rest -= _copies_of_embedding(files, architecture, names)
    problems += [f"{name} has no place in {architecture.name}" for name in sorted(rest)]
    if problems:
        more = f"\n  ... and {len(problems) - 3} more" if len(problems) > 3 else ""
        shown = "\n  ".join(problems[:3])
        raise HuggingFaceError(
            f"{files.folder}: its tensors are not those of its config.json:\n  {shown}{more}"
        )
    return names


def _copies_of_embedding(files: WeightFiles, architecture: Architecture, names: dict[str, str]) -> set[str]:
    """Names of a tied head that was stored nevertheless.

    Raises:
        HuggingFaceError: it differs from the embedding.
    """
    heads = {architecture.head, architecture.aliases.get(architecture.head, architecture.head)}
    found = heads & files.names
    embedding = next(stored for name, stored in names.items() if "emb" in name or "wte" in name)
    for name in found:
        if embedding in files.names and not torch.equal(files.read(name), files.read(embedding)):
            raise HuggingFaceError(
                f"{files.folder}: tie_word_embeddings is true, but {name} differs from {embedding}; write "
                "tie_word_embeddings: false into config.json if the head is meant to be its own"
            )
    return found


def check_import(folder: Path, run_dir: Path, *, text: Path | None) -> Parity:
    """Compare an imported model with transformers' from the folder that it came from."""
    run = open_run(run_dir)
    model = decoder_in_fp32(run, run.states().read)
    return compare(model, their_logits(folder), None if text is None else read_text(text, run))
