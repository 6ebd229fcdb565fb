"""The parts of precision together, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Literal

from fp8train.precision.gradients import Gradients
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.problems import Problem, illegal_choices, refuse
from fp8train.precision.state_formats import StateFormats
from fp8train.precision.traffic import Traffic

Smoothing = Literal["off", "token", "channel"]
"""Of SwiGLU's output, around the down projection: not at all; token by token; the size of each channel in the
down projection's weight."""
GuardAction = Literal["off", "report", "bf16", "recover"]


@dataclass(frozen=True)
class Precision:
    """Everything that is FP8, and what is not.

    Attributes:
        gemm: the GEMMs of the linears in FP8; None: all multiply in high precision.
        gradient: storage and reduction of gradients.
        state: optimizer states of the linears in FP8.
        weights: how those have their weights between steps: in the compute type, or in FP8 only.
        traffic: what ranks send each other.
        smooth_swiglu: factors around the down projection.
        guard_action: what happens to linears that stand out.

    Raises:
        PrecisionError: parts that do not fit together.
    """

    gemm: LinearQuant | None
    gradient: Gradients
    state: StateFormats
    weights: Literal["compute", "fp8"]
    traffic: Traffic
    smooth_swiglu: Smoothing = "off"
    guard_action: GuardAction = "off"

    def __post_init__(self) -> None:
        refuse(illegal_choices(self))
        if self.gemm is None:
            refuse(self._without_fp8_gemms())
            return
        refuse([*self._guard(self.gemm), *self._resident_weights(self.gemm), *self._traffic(self.gemm)])

    def _without_fp8_gemms(self) -> Iterator[Problem]:
        for key, off in (
            ("gradient.format", self.gradient.format is None),
            ("state", all(fmt.format == "fp32" for fmt in self.state.formats().values())),
            ("weights", self.weights == "compute"),
            ("traffic", not any(astuple(self.traffic))),
        ):
            if not off:
                yield Problem(
                    f"{key} applies to the linears that multiply in FP8, but gemm.fp8 is false; "
                    "write gemm.fp8: true or level: O0",
                    (key, "gemm.fp8"),
                )
        if self.guard_action != "off":
            yield Problem(
                f"guard.action: {self.guard_action} watches linears that multiply in FP8, but gemm.fp8 is "
                "false; remove it, or write gemm.fp8: true",
                ("guard.action", "gemm.fp8"),
            )

    def _guard(self, gemm: LinearQuant) -> Iterator[Problem]:
        if self.guard_action not in ("bf16", "recover"):
            return
        if self.weights == "fp8":
            yield Problem(
                f"guard.action: {self.guard_action} multiplies by weights in the compute type, but weights: "
                "fp8 keeps none; write weights: compute, or guard.action: report",
                ("guard.action", "weights"),
            )
        delayed = (use for use, spec in gemm.operands().items() if spec.scale_source == "delayed")
        if self.guard_action == "bf16" and (use := next(delayed, None)):
            yield Problem(
                "guard.action: bf16 leaves holes in the amax history of delayed scales, and "
                f"gemm.{use}.scale_source is delayed; take a recipe whose scales are current, or "
                "guard.action: recover, which begins with those scales",
                ("guard.action", f"gemm.{use}.scale_source"),
            )

    def _resident_weights(self, gemm: LinearQuant) -> Iterator[Problem]:
        if self.weights == "compute":
            if self.traffic.weights:
                yield Problem(
                    "traffic.weights: fp8 sends the codes of weights that rest in FP8, but weights is "
                    "compute; write traffic.weights: compute",
                    ("traffic.weights", "weights"),
                )
            return
        if self.smooth_swiglu == "channel":
            yield Problem(
                "smooth_swiglu: channel casts the down projections' weights for every micro-batch, but "
                "weights is fp8; write weights: compute, or smooth_swiglu: token",
                ("gemm.smooth_swiglu", "weights"),
            )
        for message, keys in gemm.against_resident_weights():
            yield Problem(message, ("weights", *(f"gemm.{key}" for key in keys)))

    def _traffic(self, gemm: LinearQuant) -> Iterator[Problem]:
        """What travels as codes of operands needs operands that have codes."""
        if gemm.is_nvfp4:
            key = "gemm.output.x.format"
            reason = " of GEMM operands, but e2m1 operands are simulated and have none"
        elif not gemm.grad_weight_fp8:
            key = "gemm.grad_weight.fp8"
            reason = f", but {key}: false multiplies unquantised values"
        else:
            return
        for name in ("activations", "grad_output"):
            if getattr(self.traffic, name):
                yield Problem(
                    f"traffic.{name}: fp8 sends codes{reason}; write traffic.{name}: compute",
                    (f"traffic.{name}", key),
                )
