"""What of our quantisation Transformer Engine does too: its quantisers for single casts, its GEMMs, and its
recipes for whole linears. Its names alone; nothing of it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fp8train.precision.linear_gemms import GEMMS, LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import Granularity


def mismatch(spec: QuantSpec) -> str | None:
    """Why none of Transformer Engine's quantisers makes the codes of ``spec``; None if one does.

    They are the same bits for sources that are finite. A scale below 2^-126 or above is where ours ends, and
    an infinity is where its quantisers saturate, except with a delayed or constant scale, whose amax comes
    back: our scale becomes NaN there (:mod:`fp8train.numerics.scale`).
    """
    if spec.is_nvfp4:
        return (
            "is simulated with values in the compute type, and its quantiser packs FP4 codes, with other "
            "random bits and signs"
        )
    if spec.granularity == "row":
        return "has scales of rows, and it has none"
    if spec.scale_source == "mse":
        return "has scales of least squared error, and it has none"
    if spec.scale_source == "current" and spec.margin:
        return f"has a margin of {spec.margin}, and its scales from a tensor's own amax have none"
    return None


_BLOCKS = (
    ("block_1x128", "block_1x128"),
    ("block_1x128", "block_128x128"),
    ("block_128x128", "block_1x128"),
)


def has_gemm(
    kinds: tuple[Granularity, Granularity], capability: tuple[int, int], *, power_of_two: bool
) -> bool:
    """Whether it multiplies operands that share scales like this, on a GPU of this compute capability.

    Args:
        kinds: what shares a scale in operands A and B.
        capability: of the device.
        power_of_two: whether all scales are powers of two.
    """
    blackwell = (10, 0) <= capability < (12, 0)
    if kinds == ("tensor", "tensor"):
        return capability >= (8, 9)
    if kinds in _BLOCKS:  # on Blackwell read as blocks of MXFP8
        return capability[0] == 9 or (blackwell and power_of_two)
    return kinds == ("mx_1x32", "mx_1x32") and blackwell


def gemms(quant: LinearQuant, capability: tuple[int, int]) -> dict[str, bool]:
    """Whether :func:`has_gemm`, for each of a linear's GEMMs in FP8."""
    specs = quant.operands()
    return {
        gemm: has_gemm(
            (specs[a].granularity, specs[b].granularity),
            capability,
            power_of_two=specs[a].power_of_two and specs[b].power_of_two,
        )
        for gemm, (a, b) in GEMMS.items()
        if quant.in_fp8(gemm)
    }


@dataclass(frozen=True)
class NativeRecipe:
    """One of Transformer Engine's recipes.

    Attributes:
        name: its class.
        options: of its constructor, with ``fp8_format`` by name.
        power_of_two: what its ``QParams`` say of scales; None where there is nothing to say.
        multiple: what sizes of matrices have to be multiples of.
        least: compute capability that it needs.
        below: the first that it does not run on; None: none known.
    """

    name: str
    options: Mapping[str, int | str] = field(default_factory=dict)
    power_of_two: bool | None = None
    multiple: int = 16
    least: tuple[int, int] = (8, 9)
    below: tuple[int, int] | None = None

    def unfit(self, capability: tuple[int, int]) -> str | None:
        """Why a GPU of this compute capability does not run it; None if it does."""
        if self.least <= capability and (self.below is None or capability < self.below):
            return None
        newer = "" if self.below is None else f" and below {_text(self.below)}"
        return (
            f"{self.name} needs compute capability {_text(self.least)} or newer{newer}, and this GPU has "
            f"{_text(capability)}"
        )


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def native_recipe(quant: LinearQuant) -> NativeRecipe | str:
    """The recipe under which Transformer Engine's own linears do what ``quant`` says, or why there is none.

    Gradients are E5M2 (its HYBRID) or E4M3, everything else is E4M3. What backward keeps is its own affair.
    """
    if not quant.grad_weight_fp8:
        return "weight gradients are not from FP8 operands, and its are"
    x, w = quant.output_x, quant.output_w
    grad = quant.grad_input_grad_output
    pairs = (quant.grad_weight_x, x), (quant.grad_input_w, w), (quant.grad_weight_grad_output, grad)
    if x.is_nvfp4:
        plain = not x.hadamard and x.granularity == "nv_1x16" and w.granularity == "nv_16x16"
        both = quant.grad_weight_x.hadamard and quant.grad_weight_grad_output.hadamard
        if plain and both and grad.rounding == "stochastic":
            return NativeRecipe("NVFP4BlockScaling", least=(10, 0))
        return "its NVFP4 has 1x16 and 16x16, a Hadamard transform, and stochastic gradients"
    if any(one != other for one, other in pairs):
        return "operands of backward GEMMs are cast in another way than those of forward, and its are not"
    if x.format is not E4M3 or w.format is not E4M3:
        return "its inputs and weights are E4M3"
    options: dict[str, int | str] = {"fp8_format": "HYBRID" if grad.format is E5M2 else "E4M3"}
    kinds = (x.granularity, w.granularity, grad.granularity)
    if len({(spec.scale_source, spec.power_of_two, spec.margin) for spec in (x, w, grad)}) > 1:
        return "operands have scales of several kinds, and its are of one"
    if x.scale_source == "delayed":
        return _delayed(quant, options)
    if x.scale_source != "current" or x.margin:
        return f"it has no scales like {x}"
    if kinds == ("tensor", "tensor", "tensor"):
        return NativeRecipe(
            "Float8CurrentScaling", options | {"use_power_2_scales": x.power_of_two}, x.power_of_two
        )
    if kinds == ("block_1x128", "block_128x128", "block_1x128"):
        return NativeRecipe(
            "Float8BlockScaling",
            options | {"use_f32_scales": not x.power_of_two},
            x.power_of_two,
            least=(9, 0),
        )
    if kinds == ("mx_1x32", "mx_1x32", "mx_1x32"):
        return NativeRecipe("MXFP8BlockScaling", options, multiple=32, least=(10, 0), below=(12, 0))
    return f"it has no scales of {', '.join(dict.fromkeys(kinds))} together"


def _delayed(quant: LinearQuant, options: dict[str, int | str]) -> NativeRecipe | str:
    specs = set(quant.casts().values())
    x = quant.output_x
    if len({(spec.history, spec.reduce, spec.interval) for spec in specs}) > 1:
        return "delayed scales have several histories, and its have one"
    if x.power_of_two or x.interval > 1:
        return "its delayed scales are FP32 numbers, computed anew at every step"
    history = {"amax_history_len": x.history, "amax_compute_algo": x.reduce, "margin": x.margin}
    return NativeRecipe("DelayedScaling", options | history)
