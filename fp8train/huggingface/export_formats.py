"""What an exported file holds: BF16 or FP32 numbers, or FP8 codes with scales as inference engines read them.

``fp8_block``
    DeepSeek-V3's: E4M3, one scale for 128x128 elements of each of *their* matrices, stored as
    ``weight_scale_inv`` (the number that codes are multiplied by); inputs are quantised at run time
    (``activation_scheme: dynamic``). transformers and vLLM read it as ``quant_method: fp8``. Engines join q,
    k, v and gate, up, and cut matrices over ranks, at multiples of 128: a matrix of other sizes stays in
    BF16 and is listed in ``modules_to_not_convert``, and what is joined to it as well.
``fp8_tensor``
    compressed-tensors' ``float-quantized`` with the strategy ``tensor``: E4M3, one ``weight_scale`` a matrix;
    inputs are quantised at run time, token by token. The scale is that of *our* matrix, so q, k, v (and gate,
    up) share it, and an engine that joins them has nothing to requantise.

Scales are powers of two: codes times scale are exact in BF16, so the reader's dequantisation rounds nothing.
Embeddings, head and norms are BF16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fp8train.huggingface.architecture import TensorMap
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.files import WeightFiles
from fp8train.numerics.cast import quantize
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec

FormatName = Literal["bf16", "fp32", "fp8_block", "fp8_tensor"]
BLOCK = 128
_SPECS = {
    "fp8_block": QuantSpec(E4M3, "block_128x128"),
    "fp8_tensor": QuantSpec(E4M3, "tensor"),
}
_SCALE_SUFFIX = {"fp8_block": "_scale_inv", "fp8_tensor": "_scale"}


@dataclass(frozen=True)
class ExportFormat:
    """How the tensors of one model are stored.

    Attributes:
        name: see the module.
        quantised: our weights that are stored in FP8.
        kept: their matrices that are not, by reason.
    """

    name: FormatName
    quantised: frozenset[str] = frozenset()
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors that are not in FP8."""
        return torch.float32 if self.name == "fp32" else torch.bfloat16

    def encode(self, tensor: TensorMap, value: Tensor) -> dict[str, Tensor]:
        """Their tensors by name, of our FP32 value."""
        if tensor.ours not in self.quantised:
            parts = tensor.arrangement.to_theirs(value.to(self.dtype))
            return dict(zip(tensor.theirs, parts, strict=True))
        spec, suffix = _SPECS[self.name], _SCALE_SUFFIX[self.name]
        if self.name == "fp8_tensor":
            payload, scale_inv = quantize(value, spec)
            coded = [(part, scale_inv.reshape(1).clone()) for part in tensor.arrangement.to_theirs(payload)]
        else:
            coded = [quantize(part, spec) for part in tensor.arrangement.to_theirs(value)]
        found: dict[str, Tensor] = {}
        for name, (payload, scale_inv) in zip(tensor.theirs, coded, strict=True):
            found |= {name: payload, name + suffix: scale_inv}
        return found

    def sizes(self, tensor: TensorMap, shape: tuple[int, ...]) -> dict[str, int]:
        """Bytes of what :meth:`encode` gives for a tensor of this shape."""
        encoded = self.encode(tensor, torch.empty(shape, device="meta"))
        return {name: part.nbytes for name, part in encoded.items()}

    def config(self) -> dict[str, Any]:
        """The entry ``quantization_config`` of config.json; empty without FP8."""
        if not self.quantised:
            return {}
        kept = ["lm_head", *(name for names in self.kept.values() for name in names)]
        if self.name == "fp8_block":
            return {
                "quantization_config": {
                    "quant_method": "fp8",
                    "fmt": "e4m3",
                    "weight_block_size": [BLOCK, BLOCK],
                    "activation_scheme": "dynamic",
                    "modules_to_not_convert": kept,
                }
            }
        eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**eight_bits, "strategy": "tensor", "dynamic": False},
            "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
        }
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": kept,
            }
        }

    def describe(self) -> str:
        """Say in one line, for the terminal, what is stored how."""
        if not self.quantised:
            return self.name
        line = f"{self.name}: {len(self.quantised)} matrices in E4M3, the rest in BF16"
        reasons = [f"{reason}: {len(names)}" for reason, names in self.kept.items()]
        return line + (f"; left in BF16: {', '.join(reasons)}" if reasons else "")


def choose_format(
    name: FormatName,
    maps: Sequence[TensorMap],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    planned: Collection[str],
) -> ExportFormat:
    """Decide which matrices are stored in FP8, and why the others are not.

    Args:
        name: see the module.
        maps: tensors of the model.
        shapes: of our tensors.
        planned: paths of linears that may be FP8: those of the run's FP8 plan, or all hidden linears.

    Raises:
        HuggingFaceError: no matrix can be in FP8.
    """
    if not name.startswith("fp8"):
        return ExportFormat(name)
    quantised: set[str] = set()
    kept: dict[str, list[str]] = {}
    for tensor in maps:
        path, _, kind = tensor.ours.rpartition(".")
        if not path.startswith("layers.") or kind != "weight" or path.endswith("norm"):
            continue
        sizes = [size for part in tensor.arrangement.shapes(shapes[tensor.ours]) for size in part]
        modules = [their.removesuffix(".weight") for their in tensor.theirs]
        if path not in planned:
            kept.setdefault("not in the run's FP8 plan", []).extend(modules)
        elif name == "fp8_block" and any(size % BLOCK for size in sizes):
            kept.setdefault(f"sizes are not multiples of {BLOCK}", []).extend(modules)
        else:
            quantised.add(tensor.ours)
    if not quantised:
        reasons = "; ".join(f"{reason}: {', '.join(names[:3])}, ..." for reason, names in kept.items())
        other = "; fp8_tensor takes all sizes" if name == "fp8_block" else ""
        raise HuggingFaceError(f"--dtype {name}: no matrix can be in FP8 ({reasons}){other}")
    return ExportFormat(name, frozenset(quantised), {why: tuple(names) for why, names in kept.items()})


def decode(files: WeightFiles, name: str) -> Tensor:
    """A stored tensor's values in FP32, by the definition of its format."""
    stored = files.read(name).float()
    if name + "_scale" in files.names:
        return stored * files.read(name + "_scale")
    if name + "_scale_inv" not in files.names:
        return stored
    scales = files.read(name + "_scale_inv")
    for dim, size in enumerate(stored.shape):
        scales = scales.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
    return stored * scales
