"""Bytes that a rank stores: of the hidden linears per parameter, and of the whole model.

Bytes are persistent between steps, scales included. *Per parameter* counts the matrices of the hidden
linears: gradient, master weight and moments. The compute copy of the weights and the accumulator of
micro-batches stand beside them, as does the whole model. A run counts what it has allocated
(:mod:`fp8train.live.describe`); :mod:`fp8train.planning.rank_bytes` computes the same before there is a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8train.live.console import format_bytes


@dataclass(frozen=True)
class StoredBytes:
    """Bytes that this rank stores, by what they are for.

    Attributes:
        parameters: elements of the hidden linears' matrices.
        states: by what: ``gradient``, then the optimizer's roles; of those matrices.
        compute_copy: their weights as the GEMMs read them.
        accumulator: of those matrices, while micro-batches add up.
        whole_model: everything above for all parameters.
    """

    parameters: int
    states: dict[str, int]
    compute_copy: int
    accumulator: int
    whole_model: int

    def per_parameter(self) -> dict[str, float]:
        """``{what: bytes}`` per parameter of the FP8 plan, with ``total`` over ``states``."""
        shares = {name: count / self.parameters for name, count in self.states.items()}
        return {
            **shares,
            "total": sum(shares.values()),
            "compute_copy": self.compute_copy / self.parameters,
            "accumulator": self.accumulator / self.parameters,
        }

    def __str__(self) -> str:
        shares = self.per_parameter()
        states = ", ".join(f"{name} {shares[name]:.2f}" for name in self.states)
        return (
            f"{shares['total']:.2f} bytes per parameter of the hidden linears ({states}) "
            f"+ compute copy {shares['compute_copy']:.2f} + accumulator {shares['accumulator']:.2f}; "
            f"whole model {format_bytes(self.whole_model)}"
        )
