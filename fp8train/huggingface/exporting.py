"""``fp8train export hf``: a checkpoint becomes a folder that transformers and inference engines read.

Master weights are read one at a time, multiplied by what the parametrisation would multiply them by, laid out
as the architecture wants them and rounded once. At most one shard is in memory. The folder appears by a
rename, complete and checked, or not at all.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8train.checkpoint.safetensors_files import parse_size, write_safetensors
from fp8train.config.linear_names import linears_in_fp8
from fp8train.huggingface.architecture import Architecture, TensorMap
from fp8train.huggingface.config_json import CONFIG_FILE
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.export_formats import ExportFormat, FormatName, choose_format, decode
from fp8train.huggingface.files import WeightFiles
from fp8train.huggingface.find_architecture import architecture_of_model
from fp8train.huggingface.folding import Multipliers, check_foldable
from fp8train.huggingface.output import new_folder, read_text
from fp8train.huggingface.parity import (
    check_passed,
    compare,
    decoder_in_fp32,
    their_logits,
    wants_check,
)
from fp8train.huggingface.tokenizer_files import export_tokenizer
from fp8train.inference.load import TrainedRun, open_run
from fp8train.inference.stored_states import StoredStates
from fp8train.models.build import with_vocab_size
from fp8train.models.decoder import Decoder


@dataclass(frozen=True)
class Export:
    """Everything that one export is made of: checkpoint, target architecture and format.

    Attributes:
        run: the checkpoint.
        architecture: what it becomes.
        maps: its tensors.
        shapes: of our tensors by name, those that the model lacks included.
        states: reads ours.
        multipliers: that go into them.
        format: how they are stored.
    """

    run: TrainedRun
    architecture: Architecture
    maps: tuple[TensorMap, ...]
    shapes: Mapping[str, tuple[int, ...]]
    states: StoredStates
    multipliers: Multipliers
    format: ExportFormat

    @property
    def parameters(self) -> int:
        """Number of parameters of the exported model."""
        parts = [part for one in self.maps for part in one.arrangement.shapes(self.shapes[one.ours])]
        return sum(math.prod(part) for part in parts)

    def encode(self, tensor: TensorMap) -> dict[str, Tensor]:
        """Encode one of our tensors: their tensors by name, in the export's format.

        Raises:
            HuggingFaceError: it is not finite.
        """
        fqn, shape = tensor.ours, self.shapes[tensor.ours]
        if fqn in self.states.model.specs:
            value = self.states.read(fqn).float()
        else:
            value = torch.full(shape, 1.0 if fqn.endswith("norm.weight") else 0.0)
        value = value * self.multipliers.of(fqn, shape)
        if not torch.isfinite(value).all():
            raise HuggingFaceError(f"{fqn} is not finite; export a checkpoint from before the run diverged")
        return self.format.encode(tensor, value)


def _shape(fqn: str, decoder: Decoder) -> tuple[int, ...]:
    """Shape of a parameter, perhaps a vector that the decoder lacks."""
    if fqn in decoder.specs:
        return decoder.specs[fqn].global_shape
    module = fqn.rpartition(".")[0]
    is_norm = module.endswith("norm")
    return (decoder.config.hidden_size,) if is_norm else decoder.specs[f"{module}.weight"].global_shape[:1]


def plan_export(run: TrainedRun, name: FormatName) -> Export:
    """Decide what exporting a checkpoint means: architecture, tensors, multipliers and format.

    Args:
        run: the checkpoint.
        name: see :mod:`fp8train.huggingface.export_formats`.

    Raises:
        HuggingFaceError: no architecture computes what the model does, or it cannot be stored like that.
    """
    where = str(run.path)
    model = with_vocab_size(run.config.model, run.vocab_size)
    architecture = architecture_of_model(model, where)
    states = run.states()
    decoder = states.model
    check_foldable(decoder, where)
    if name.startswith("fp8") and not architecture.linears:
        raise HuggingFaceError(
            f"--dtype {name}: the FP8 formats of inference engines are for separate nn.Linear modules; "
            f"{architecture.name} has other ones (Conv1D, or q, k, v whose rows engines reorder); write bf16"
        )
    maps = tuple(architecture.tensors(model))
    shapes = {one.ours: _shape(one.ours, decoder) for one in maps}
    planned = linears_in_fp8(run.config) or list(decoder.linears())
    chosen = choose_format(name, maps, shapes, planned=planned)
    return Export(run, architecture, maps, shapes, states, Multipliers(decoder), chosen)


def write_export(export: Export, folder: Path, *, max_bytes: int) -> list[str]:
    """Write config.json, weights and tokenizer; returns what to tell.

    Args:
        export: what.
        folder: an empty one.
        max_bytes: largest shard.
    """
    run = export.run
    eod_id, told = export_tokenizer(run, folder)
    config = _config(export, eod_id)
    _write_json(folder / CONFIG_FILE, config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    sizes_of = export.format.sizes
    parts = [(sizes_of(one, export.shapes[one.ours]), partial(export.encode, one)) for one in export.maps]
    write_safetensors(folder, "model", parts, max_bytes=max_bytes)
    size = sum(sum(sizes.values()) for sizes, _ in parts)
    tensors = sum(len(sizes) for sizes, _ in parts)
    return [f"weights: {export.format.describe()}; {tensors} tensors, {size / 1e6:,.1f} MB", told]


def _config(export: Export, eod_id: int | None) -> dict[str, Any]:
    model = with_vocab_size(export.run.config.model, export.run.vocab_size)
    return {
        "architectures": [export.architecture.name],
        "model_type": export.architecture.model_types[0],
        **export.architecture.config(model),
        "bos_token_id": None,
        "eos_token_id": eod_id,
        "pad_token_id": None,
        "torch_dtype": str(export.format.dtype).removeprefix("torch."),
        **export.format.config(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def exported_values(export: Export, files: WeightFiles, fqn: str) -> Tensor:
    """What one of the run's parameters became: read back, laid out as ours and divided by its multiplier."""
    tensor = next(one for one in export.maps if one.ours == fqn)
    shape = export.shapes[fqn]
    value = tensor.arrangement.to_ours([decode(files, name) for name in tensor.theirs], shape)
    return value / export.multipliers.of(fqn, shape)


def check_export(export: Export, folder: Path, *, text: Path | None) -> list[str]:
    """Compare an exported folder, read by transformers, with the run's model on the same rounded weights, and
    that with the run's own weights; returns what to tell.

    Raises:
        HuggingFaceError: transformers computes something else.
    """
    run = export.run
    tokens = None if text is None else read_text(text, run)
    with WeightFiles(folder) as files:
        rounded = decoder_in_fp32(run, lambda fqn: exported_values(export, files, fqn))
    # transformers' model is gone afterwards: two models in memory at a time
    parity = compare(rounded, their_logits(folder), tokens)
    check_passed(parity, "nothing was exported")
    lines = parity.lines()
    if export.format.name == "fp32":
        return lines
    exact = decoder_in_fp32(run, export.states.read)
    moved = compare(exact, rounded.logits, tokens)
    line = f"rounding FP32 masters to {export.format.name} moves a logit by {moved.difference:.2e} at most"
    if moved.perplexities is not None:
        line += f", perplexity from {moved.perplexities[0]:.6g} to {moved.perplexities[1]:.6g}"
    return [*lines, line]


def export_command(
    checkpoint: Path,
    *,
    output: Path,
    dtype: FormatName,
    max_shard_size: str,
    check: bool | None,
    text: Path | None,
) -> int:
    """Export a checkpoint, compare it with transformers, and report.

    Args:
        checkpoint: step directory, or run directory for its newest good checkpoint.
        output: folder to make; absent or empty.
        dtype: see :mod:`fp8train.huggingface.export_formats`.
        max_shard_size: such as ``5GB``.
        check: compare with transformers; None: where it is installed.
        text: file whose perplexity is compared.

    Returns:
        Exit status 0.

    Raises:
        UserError: the model cannot be expressed or the folder not be written, or transformers computes
            something else from it.
    """
    checked = wants_check(check, text)
    max_bytes = parse_size(max_shard_size)
    began = time.perf_counter()
    run = open_run(checkpoint)
    export = plan_export(run, dtype)
    with new_folder(output) as folder:
        told = write_export(export, folder, max_bytes=max_bytes)
        print(
            f"{run.path}: step {run.step}, {export.parameters:,} parameters -> {export.architecture.name} in "
            f"{output}, {time.perf_counter() - began:.1f} s"
        )
        print("\n".join(told), flush=True)
        if checked:
            print("\n".join(check_export(export, folder, text=text)), flush=True)
    return 0
