"""What ranks send each other in FP8, besides gradients."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What travels in FP8, of the linears that multiply in FP8; the rest in the compute type.

    Attributes:
        activations: inputs of column-parallel linears.
        grad_output: output gradients of row-parallel linears.
        grad_input: input gradients of column-parallel linears.
        output: outputs of row-parallel linears.
        weights: new weights from their ZeRO owners.
        pipeline: activations and their gradients between pipeline stages.
    """

    activations: bool = False
    grad_output: bool = False
    grad_input: bool = False
    output: bool = False
    weights: bool = False
    pipeline: bool = False
