"""How the optimizer states of a matrix are stored.

Three *roles* have a format each: ``master`` (the weight that updates are added to), ``exp_avg`` (first
moment) and ``exp_avg_sq`` (second moment). They hold for the matrices of the FP8 plan; every other parameter
keeps FP32 states (:class:`~fp8train.optim.optimizer.Optimizer` decides by global shape).

What a role needs decides its format (FP8-LM, Peng et al. 2023, section 2.2). The master adds updates that are
small against it: it needs mantissa, 11 bits with stochastic rounding or more. The first moment needs a
direction: 4 bits of mantissa. The second moment is a square, so its exponents spread twice as far and its
root divides: it needs range. One E4M3 scale per tensor spans 2^18, so a gradient 480 times smaller than the
largest has a second moment of zero; blocks, 16 bits, the root, or an expanded range each repair that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fp8train.precision.operand_cast import Rounding
from fp8train.precision.problems import Problem, illegal_choices, out_of_range, refuse
from fp8train.precision.scale_blocks import MAX_BLOCK, block_size

StateName = Literal["fp32", "fp64", "bf16", "fp16_scaled", "bf16_remainder", "e4m3", "e5m2"]
StateGranularity = Literal["tensor", "block"]

SCALED_STATES = ("fp16_scaled", "e4m3", "e5m2")
"""Formats that have scales."""
FP8_STATES = ("e4m3", "e5m2")
ROUNDED_STATES = ("bf16", *SCALED_STATES)
"""Those that lose bits of FP32."""


@dataclass(frozen=True)
class StateFormat:
    """How one state is stored.

    Attributes:
        format: ``fp32`` (stands for FP64 where the parameter is FP64); ``fp64``; ``bf16``; ``fp16_scaled``,
            ``e4m3``, ``e5m2``: that format with power-of-two scales; ``bf16_remainder``: the nearest BF16 and
            the 16 bits that it lacks, FP32 exactly.
        granularity: what shares a scale in ``fp16_scaled``, ``e4m3`` and ``e5m2``. ``block``: a run of a row;
            one pass over memory, nothing to agree between ranks that hold different rows. ``tensor``: as
            FP8-LM; two passes, the first for amax.
        block: largest block, up to 128; the block is the largest divisor of the row up to it.
        expand: FP8 blocks only: stretch each block's range of magnitudes over the format's.
        sqrt: second moment only: store its root, which needs half the exponents.
        rounding: of a state that loses bits; ``stochastic`` keeps small updates on average.
        fit: where a cut along rows would split blocks, take the largest block that it leaves whole; else that
            is refused, for then the scales depend on the layout.

    Raises:
        PrecisionError: settings that the format would ignore or cannot have.
    """

    format: StateName = "fp32"
    granularity: StateGranularity = "block"
    block: int = MAX_BLOCK
    expand: bool = False
    sqrt: bool = False
    rounding: Rounding = "nearest"
    fit: bool = False

    def __post_init__(self) -> None:
        refuse([*illegal_choices(self), *out_of_range(self, "block", 1, MAX_BLOCK, "elements")])
        refuse(self._ignored())

    def _ignored(self) -> Iterator[Problem]:
        name = self.format
        if self.granularity == "tensor" and not self.is_scaled:
            remedy = f"{name} has no scale; leave it out or choose one of {', '.join(SCALED_STATES)}"
            yield Problem(f"granularity: tensor with format {name}: {remedy}", ("granularity", "format"))
        if self.block != MAX_BLOCK and not self.in_blocks:
            remedy = (
                "there are no block scales; leave it out or write granularity: block with a scaled format"
            )
            yield Problem(f"block: {self.block} with format {name}: {remedy}", ("block", "format"))
        if self.expand and not (name in FP8_STATES and self.in_blocks):
            remedy = (
                "only FP8 blocks have a range to expand; write format: e4m3 or e5m2 with granularity: block"
            )
            yield Problem(f"expand: true with format {name}: {remedy}", ("expand", "format"))
        if self.sqrt and self.is_exact:
            yield _no_root(self)
        if self.rounding == "stochastic" and self.is_exact:
            remedy = f"{name} rounds nothing away; write nearest"
            yield Problem(f"rounding: stochastic with format {name}: {remedy}", ("rounding", "format"))

    @property
    def is_exact(self) -> bool:
        """Whether every FP32 value survives being stored."""
        return self.format not in ROUNDED_STATES

    @property
    def is_scaled(self) -> bool:
        """Whether the format has a scale beside its codes."""
        return self.format in SCALED_STATES

    @property
    def in_blocks(self) -> bool:
        """Whether runs of a row have scales of their own."""
        return self.is_scaled and self.granularity == "block"

    def block_in(self, row: int, whole_row: int) -> int:
        """Elements that share a scale in a rank's part of a row; 1 where the format has no block scales.

        Args:
            row: elements of the part, which begins at a multiple of them.
            whole_row: elements of the logical row.
        """
        if not self.in_blocks:
            return 1
        block = block_size(whole_row, self.block)
        return block_size(row, self.block) if self.fit and row % block else block

    @property
    def two_pass(self) -> bool:
        """Whether one scale covers the tensor, so that its amax must be known before anything is stored."""
        return self.is_scaled and self.granularity == "tensor"

    def __str__(self) -> str:
        parts = [f"sqrt({self.format})" if self.sqrt else self.format]
        if self.is_scaled:
            parts.append("tensor" if self.granularity == "tensor" else f"block{self.block}")
        if self.expand:
            parts.append("expanded")
        if self.rounding == "stochastic":
            parts.append("stochastic")
        return "/".join(parts)


def _no_root(fmt: StateFormat, role: str = "") -> Problem:
    remedy = "it halves the exponents of a second moment in 8 or 16 bits; leave it out"
    return Problem(f"sqrt: true with format {fmt.format}: {remedy}", (f"{role}sqrt", f"{role}format"))


@dataclass(frozen=True)
class StateFormats:
    """The formats of the three states of a matrix in the FP8 plan.

    Attributes:
        master: weight that updates are added to.
        exp_avg: first moment.
        exp_avg_sq: second moment; None for optimizers that have none (Lion).

    Raises:
        PrecisionError: a format makes no sense for its role.
    """

    master: StateFormat = StateFormat()
    exp_avg: StateFormat = StateFormat()
    exp_avg_sq: StateFormat | None = StateFormat()

    def __post_init__(self) -> None:
        refuse(self._wrong_roles())

    def _wrong_roles(self) -> Iterator[Problem]:
        for role, fmt in self.formats().items():
            if fmt.format == "bf16_remainder" and role != "master":
                yield Problem(
                    "format: bf16_remainder: it pairs a weight with its missing bits; write fp32, which has "
                    "the same size, or bf16",
                    (f"{role}.format",),
                )
            if fmt.sqrt and role != "exp_avg_sq":
                yield _no_root(fmt, f"{role}.")

    def formats(self) -> dict[str, StateFormat]:
        """Format by role, without an absent second moment."""
        formats = {"master": self.master, "exp_avg": self.exp_avg}
        return formats if self.exp_avg_sq is None else {**formats, "exp_avg_sq": self.exp_avg_sq}

    def __str__(self) -> str:
        return " ".join(f"{role}={fmt}" for role, fmt in self.formats().items())
