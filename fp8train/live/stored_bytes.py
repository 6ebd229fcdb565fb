"""Bytes that a rank stores: of the FP8 plan, of the hidden linears, and of the whole model.

Bytes are persistent between steps, scales included, and *all in*: weights as the GEMMs read them, gradients
with the accumulator of micro-batches, master weights and moments. A run counts what it has allocated
(:mod:`fp8train.live.describe`); :mod:`fp8train.planning.rank_bytes` computes the same before there is a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8train.live.console import format_bytes

_APART = ("weight", "accumulator")
"""What stands beside gradient and states where those are summed."""


@dataclass(frozen=True)
class Footprint:
    """What some parameters take on a rank.

    Attributes:
        parameters: their elements on this rank.
        values: bytes by what they are for: ``weight``, ``gradient``, ``accumulator``, then the optimizer's
            roles. A master that lives in the parameter counts once, as weight.
        scales: bytes of scales, likewise.
        on_host: what of both is in host memory (``optimizer.offload``).
    """

    parameters: int
    values: dict[str, int]
    scales: dict[str, int]
    on_host: int = 0

    @property
    def total(self) -> int:
        """Bytes of values and scales together."""
        return sum(self.values.values()) + sum(self.scales.values())

    def share(self, name: str) -> float:
        """Bytes of one kind per parameter, its scales included."""
        return (self.values[name] + self.scales.get(name, 0)) / self.parameters

    def __str__(self) -> str:
        """Everything per parameter, scales apart; what takes nothing is left out."""
        each = {**self.values, "scales": sum(self.scales.values())}
        listed = ", ".join(f"{name} {count / self.parameters:.3f}" for name, count in each.items() if count)
        host = f"; {self.on_host / self.parameters:.3f} of it in host memory" if self.on_host else ""
        return f"{self.total / self.parameters:.3f} ({listed}{host})"


@dataclass(frozen=True)
class StoredBytes:
    """Bytes that this rank stores.

    Attributes:
        plan: of the matrices in the FP8 plan; no parameters without FP8 GEMMs.
        linears: of the matrices of all hidden linears.
        model: of all parameters.
        slots: device memory beside that, for states that are in host memory between steps.
    """

    plan: Footprint
    linears: Footprint
    model: Footprint
    slots: int = 0

    def per_parameter(self) -> dict[str, float]:
        """``{what: bytes}`` per parameter of the hidden linears, with ``total`` over gradient and states."""
        shares = {name: self.linears.share(name) for name in self.linears.values if name not in _APART}
        return {
            **shares,
            "total": sum(shares.values()),
            "compute_copy": self.linears.share("weight"),
            "accumulator": self.linears.share("accumulator"),
        }

    def all_in(self) -> str:
        """Everything per parameter, of the FP8 plan and of the whole model."""
        model = f"{self.model} bytes per parameter of the whole model"
        if not self.plan.parameters:
            return model
        return f"{self.plan} bytes per parameter of the FP8 plan; {model}"

    def __str__(self) -> str:
        shares = self.per_parameter()
        states = ", ".join(f"{name} {shares[name]:.2f}" for name in self.linears.values if name not in _APART)
        return (
            f"{shares['total']:.2f} bytes per parameter of the hidden linears ({states}) "
            f"+ compute copy {shares['compute_copy']:.2f} + accumulator {shares['accumulator']:.2f}; "
            f"whole model {format_bytes(self.model.total)}{self._places()}"
        )

    def _places(self) -> str:
        """What of the whole model is not on the device, and what that costs there."""
        host = self.model.on_host
        if not host:
            return ""
        device, slots = format_bytes(self.model.total - host + self.slots), format_bytes(self.slots)
        return f": {format_bytes(host)} in host memory, {device} on the device with {slots} of slots"
