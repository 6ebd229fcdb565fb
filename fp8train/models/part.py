"""The part of a decoder that a process holds: some blocks, and whether the ends of the model are among
them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPart:
    """The part of a decoder that one process holds.

    Attributes:
        layers: global indices of its blocks, ascending.
        begins: it turns tokens into states: embedding and positions.
        ends: it turns states into a loss: final norm and head (with tied embeddings a copy of the embedding).
    """

    layers: tuple[int, ...]
    begins: bool = True
    ends: bool = True

    @classmethod
    def whole(cls, num_layers: int) -> ModelPart:
        """The part that is all of a model with this many layers."""
        return cls(tuple(range(num_layers)))
