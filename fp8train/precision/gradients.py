"""How weight gradients are stored and reduced between backward and the optimizer.

Weights of linears that multiply in FP8 may have FP8 gradients (:class:`Fp8Gradients`); everything else
(embedding, head, norms, biases, linears outside the FP8 plan) keeps high precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fp8train.precision.number_formats import E4M3, Format
from fp8train.precision.problems import Problem, Reads, illegal_choices, out_of_range, refuse, unread
from fp8train.precision.scale_blocks import MAX_BLOCK, MIN_BLOCK

Wide = Literal["fp32", "bf16"]
Accumulate = Literal["fp32", "bf16", "fp8"]
Reduction = Literal["exchange", "shared_scale", "exact", "bf16", "fp32"]
Between = Literal["fp8", "bf16"]
Algorithm = Literal["ring", "tree", "native"]
Criterion = Literal["count", "any"]
Start = Literal["one_over_ranks", "one_over_root_ranks", "one"]

FP8_GRADIENT_READS = (
    Reads(("error_feedback", "node_size"), "reduce", ("exchange",)),
    Reads(("sum", "mu_criterion", "mu_threshold", "mu_window", "mu_initial"), "reduce", ("shared_scale",)),
)


@dataclass(frozen=True)
class Fp8Gradients:
    """How the gradients of the FP8 plan are kept and reduced.

    Attributes:
        accumulate: type in which micro-batches add up; ``fp8`` casts after each addition.
        reduce: the sum over data-parallel ranks; a type reduces in it and stores in FP8.
        block: most elements of a row that share a scale, 32 to 128.
        error_feedback: ``exchange`` only: carry what the cast lost into the next step.
        node_size: ``exchange`` only: ranks of a node, which reduce among themselves first; None: one level.
        between_nodes: type between nodes, where there is a ``node_size``.
        sum: ``shared_scale`` only: who adds.
        mu_criterion: ``shared_scale`` only: what halves its auto-scaling factor.
        mu_threshold: share of entries at the format's maximum that does, for the criterion ``count``.
        mu_window: ``shared_scale`` only: quiet steps that double the factor.
        mu_initial: ``shared_scale`` only: where it starts.

    Raises:
        PrecisionError: a setting that the reduction would ignore or cannot do.
    """

    accumulate: Accumulate = "bf16"
    reduce: Reduction = "exchange"
    block: int = MAX_BLOCK
    error_feedback: bool = False
    node_size: int | None = None
    between_nodes: Between = "fp8"
    sum: Algorithm = "ring"
    mu_criterion: Criterion = "count"
    mu_threshold: float = 1e-5
    mu_window: int = 1000
    mu_initial: Start = "one_over_ranks"

    def __post_init__(self) -> None:
        refuse([*illegal_choices(self), *self._out_of_range()])
        refuse([*unread(self, FP8_GRADIENT_READS), *self._accumulated_otherwise()])

    def _out_of_range(self) -> Iterator[Problem]:
        yield from out_of_range(self, "block", MIN_BLOCK, MAX_BLOCK, "elements")
        yield from out_of_range(self, "mu_window", 1, None, "steps")
        if not 0 < self.mu_threshold < 1:
            yield Problem(f"mu_threshold: {self.mu_threshold:g}; legal: between 0 and 1", ("mu_threshold",))

    def _accumulated_otherwise(self) -> Iterator[Problem]:
        if self.accumulate == "fp8" and self.reduce != "shared_scale":
            yield Problem(
                "accumulate: fp8 is what reduce: shared_scale offers (fidelity to MS-AMP), but reduce is "
                f"{self.reduce}; write accumulate: bf16",
                ("accumulate", "reduce"),
            )


@dataclass(frozen=True)
class Gradients:
    """How all weight gradients are kept and reduced.

    Attributes:
        accumulate: type of high-precision gradients while micro-batches add up; both types stand for FP64
            where parameters are FP64.
        reduce: their type on the wire.
        bucket_mib: size of a bucket in the accumulation type, approximately, in MiB.
        format: E4M3 or E5M2 for the gradients of the FP8 plan; None: high precision too.
        fp8: how those are kept, where there is a format.

    Raises:
        PrecisionError: format and reduction do not fit.
    """

    accumulate: Wide = "fp32"
    reduce: Wide = "fp32"
    bucket_mib: float = 25.0
    format: Format | None = None
    fp8: Fp8Gradients = Fp8Gradients()

    def __post_init__(self) -> None:
        refuse(illegal_choices(self))
        if self.format is not None and self.format is not E4M3 and self.fp8.reduce == "exact":
            refuse(
                [
                    Problem(
                        f"fp8.reduce: exact counts in units of E4M3, but format is {self.format.name}; write "
                        "format: e4m3",
                        ("format", "fp8.reduce"),
                    )
                ]
            )
