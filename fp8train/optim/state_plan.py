"""How the optimizer states of a matrix are stored, as frozen values.

Three *roles* have a format each: ``master`` (the weight that updates are added to), ``exp_avg`` (first
moment) and ``exp_avg_sq`` (second moment). The plan holds for the matrices of the FP8 plan; every other
parameter keeps FP32 states (:class:`~fp8train.optim.optimizer.Optimizer` decides by global shape).

What a role needs decides its format (FP8-LM, Peng et al. 2023, section 2.2). The master adds updates that are
small against it: it needs mantissa, 11 bits with stochastic rounding or more. The first moment needs a
direction: 4 bits of mantissa. The second moment is a square, so its exponents spread twice as far and its
root divides: it needs range. One E4M3 scale per tensor spans 2^18, so a gradient 480 times smaller than the
largest has a second moment of zero; blocks, 16 bits, the root, or an expanded range each repair that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fp8train.config.state_formats import EXACT, SCALED, misfit
from fp8train.precision.scale_blocks import MAX_BLOCK

StateName = Literal["fp32", "fp64", "bf16", "fp16_scaled", "bf16_remainder", "e4m3", "e5m2"]
Granularity = Literal["tensor", "block"]
Rounding = Literal["nearest", "stochastic"]

_MIN_BLOCK = 32


@dataclass(frozen=True)
class StateFormat:
    """How one state is stored. Checked by :class:`StatePlan`, which knows the role.

    Attributes:
        name: ``fp32`` (stands for FP64 where the parameter is FP64); ``fp64``; ``bf16``; ``fp16_scaled``,
            ``e4m3``, ``e5m2``: that format with power-of-two scales; ``bf16_remainder``: the nearest BF16 and
            the 16 bits that it lacks, FP32 exactly.
        granularity: what shares a scale in ``fp16_scaled``, ``e4m3`` and ``e5m2``. ``block``: a run of a row;
            one pass over memory, nothing to agree between ranks that hold different rows. ``tensor``: as
            FP8-LM; two passes, the first for amax.
        block: largest block, 32 to 128; the block is the largest divisor of the row up to it.
        expand: FP8 blocks only: stretch each block's range of magnitudes over the format's.
        sqrt: second moment only: store its root, which needs half the exponents.
        rounding: of a state that loses bits; ``stochastic`` keeps small updates on average.
        fit: where a cut along rows would split blocks, take the largest block that it leaves whole; else that
            is refused, for then the scales depend on the layout.
    """

    name: StateName = "fp32"
    granularity: Granularity = "block"
    block: int = MAX_BLOCK
    expand: bool = False
    sqrt: bool = False
    rounding: Rounding = "nearest"
    fit: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether every FP32 value survives being stored."""
        return self.name in EXACT

    @property
    def two_pass(self) -> bool:
        """Whether one scale covers the tensor, so that its amax must be known before anything is stored."""
        return self.is_scaled and self.granularity == "tensor"

    @property
    def is_scaled(self) -> bool:
        """Whether the format has a scale beside its codes."""
        return self.name in SCALED

    def __str__(self) -> str:
        parts = [f"sqrt({self.name})" if self.sqrt else self.name]
        if self.is_scaled:
            parts.append("tensor" if self.granularity == "tensor" else f"block{self.block}")
        if self.expand:
            parts.append("expanded")
        if self.rounding == "stochastic":
            parts.append("stochastic")
        return "/".join(parts)


@dataclass(frozen=True)
class StatePlan:
    """The formats of the three states of a matrix in the FP8 plan.

    Attributes:
        master: weight that updates are added to.
        exp_avg: first moment.
        exp_avg_sq: second moment; None for optimizers that have none (Lion).

    Raises:
        ValueError: a format makes no sense for its role; names the key, the value and the remedy.
    """

    master: StateFormat = StateFormat()
    exp_avg: StateFormat = StateFormat()
    exp_avg_sq: StateFormat | None = StateFormat()

    def __post_init__(self) -> None:
        for role, fmt in self.formats().items():
            _check(f"precision.state.{role}", role, fmt)

    def formats(self) -> dict[str, StateFormat]:
        """Format by role, without an absent second moment."""
        formats = {"master": self.master, "exp_avg": self.exp_avg}
        return formats if self.exp_avg_sq is None else {**formats, "exp_avg_sq": self.exp_avg_sq}

    def __str__(self) -> str:
        return " ".join(f"{role}={fmt}" for role, fmt in self.formats().items())


def _check(key: str, role: str, fmt: StateFormat) -> None:
    """Refuse a format, or a field that this format would ignore."""
    legal = get_args(StateName)
    if fmt.name not in legal:
        raise ValueError(f"{key}.format: {fmt.name!r}; legal: {', '.join(legal)}")
    for field, value, values in (
        ("granularity", fmt.granularity, get_args(Granularity)),
        ("rounding", fmt.rounding, get_args(Rounding)),
    ):
        if value not in values:
            raise ValueError(f"{key}.{field}: {value!r}; legal: {', '.join(values)}")
    if not _MIN_BLOCK <= fmt.block <= MAX_BLOCK:
        raise ValueError(f"{key}.block: {fmt.block} elements; legal: {_MIN_BLOCK} to {MAX_BLOCK}")
    if fmt.block != MAX_BLOCK and not (fmt.is_scaled and fmt.granularity == "block"):
        raise ValueError(
            f"{key}.block: {fmt.block} with format {fmt.name}: there are no block scales; leave it out or "
            "write granularity: block with a scaled format"
        )
    problem = misfit(
        role,
        name=fmt.name,
        granularity=fmt.granularity,
        rounding=fmt.rounding,
        expand=fmt.expand,
        sqrt=fmt.sqrt,
    )
    if problem is not None:
        raise ValueError(f"{key}.{problem[1]}")
