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
from fp8train.precision.problems import Problem, Reads, illegal_choices, out_of_range, refuse, unread
from fp8train.precision.scale_blocks import MAX_BLOCK, block_size

StateName = Literal["fp32", "fp64", "bf16", "fp16_scaled", "bf16_remainder", "e4m3", "e5m2"]
StateGranularity = Literal["tensor", "block"]

SCALED_STATES = ("fp16_scaled", "e4m3", "e5m2")
"""Formats that have scales."""
FP8_STATES = ("e4m3", "e5m2")
ROUNDED_STATES = ("bf16", *SCALED_STATES)
"""Those that lose bits of FP32."""

STATE_READS = (
    Reads(("granularity",), "format", SCALED_STATES),
    Reads(("rounding", "sqrt"), "format", ROUNDED_STATES),
    Reads(("expand",), "format", FP8_STATES),
    Reads(("expand",), "granularity", ("block",)),
)
_BLOCK_READS = (Reads(("block",), "format", SCALED_STATES), Reads(("block",), "granularity", ("block",)))


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
        refuse(unread(self, (*STATE_READS, *_BLOCK_READS)))

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
                yield Problem(
                    "sqrt: true halves the exponents of a second moment; remove it", (f"{role}.sqrt",)
                )

    def formats(self) -> dict[str, StateFormat]:
        """Format by role, without an absent second moment."""
        formats = {"master": self.master, "exp_avg": self.exp_avg}
        return formats if self.exp_avg_sq is None else {**formats, "exp_avg_sq": self.exp_avg_sq}

    def __str__(self) -> str:
        return " ".join(f"{role}={fmt}" for role, fmt in self.formats().items())
