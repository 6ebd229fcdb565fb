"""Which part of a decoder a process holds: some blocks, and whether the ends of the model are among them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPart:
    """A part of a decoder.

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
        """All of it."""
        return cls(tuple(range(num_layers)))
