"""How one of our tensors lies in the tensors of a Hugging Face file.

Every arrangement is a permutation of elements (but for the padding of the vocabulary), so it serves FP32
values, rounded ones and FP8 codes alike, and a round trip keeps every bit. Both directions are defined by one
function, :meth:`Arrangement.views`: views of our tensor, one for each of theirs; exporting reads them,
importing writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.layers.mlp import shard_unit


class Arrangement:
    """How one of our tensors lies in theirs; this class: the same on both sides."""

    def views(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Views of our tensor in the shapes of theirs, or in shapes that flatten to those."""
        return (ours,)

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Their tensors, contiguous. Any dtype; our tensor is [rows, columns] or [rows] (a bias)."""
        shapes = self.shapes(tuple(ours.shape))
        return tuple(
            view.reshape(shape).contiguous() for view, shape in zip(self.views(ours), shapes, strict=True)
        )

    def to_ours(self, theirs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Put their tensors together to ours, of this ``shape`` and their dtype; padding is zero."""
        ours = theirs[0].new_zeros(shape)
        for view, source in zip(self.views(ours), theirs, strict=True):
            view.copy_(source.reshape(view.shape))
        return ours

    def shapes(self, ours: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of their tensors, from that of ours."""
        return tuple(_merge_rows(view, len(ours)) for view in self.views(torch.empty(ours, device="meta")))


def _merge_rows(view: Tensor, ndim: int) -> tuple[int, ...]:
    """Shape of a view whose leading dimensions are parts of the rows."""
    rest = tuple(view.shape[view.dim() - ndim + 1 :])
    return (view.numel() // max(1, torch.Size(rest).numel()), *rest)


SAME = Arrangement()


@dataclass(frozen=True)
class Vocabulary(Arrangement):
    """Rows of tokens; ours are padded with rows of zeros, whose logits are never looked at
    (:mod:`fp8train.layers.loss`)."""

    size: int
    """Tokens without padding."""

    def views(self, ours: Tensor) -> tuple[Tensor, ...]:
        """A view of our tensor without the padding of the vocabulary, [size, ..]."""
        return (ours[: self.size],)


@dataclass(frozen=True)
class SeparateQKV(Arrangement):
    """Queries, keys and values apart; our fused rows are ordered by key/value group
    (:mod:`fp8train.layers.attention`): the group's query heads, its key, its value."""

    num_kv_heads: int
    head_dim: int

    def views(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Views of query, key and value rows, of G groups with P query heads of width D: [G, P, D, ..], [G,
        D, ..], [G, D, ..]."""
        groups = ours.unflatten(0, (self.num_kv_heads, -1, self.head_dim))
        return groups[:, :-2], groups[:, -2], groups[:, -1]


@dataclass(frozen=True)
class GateUp(Arrangement):
    """SwiGLU's gate and up projections apart; ours alternate in units (:mod:`fp8train.layers.mlp`)."""

    ffn_hidden_size: int

    def views(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Views of the gate's rows and of up's, [units, unit, ..] each."""
        units = ours.unflatten(0, (-1, 2, shard_unit(self.ffn_hidden_size)))
        return units[:, 0], units[:, 1]


@dataclass(frozen=True)
class Conv1D(Arrangement):
    """GPT-2's linears: [in, out], and one tensor for all parts of ``inner``, one after the other."""

    inner: Arrangement = SAME

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Their one tensor: the parts of ``inner`` joined, and a matrix transposed to [in, out]."""
        rows = torch.cat(self.inner.to_theirs(ours))
        return (rows.t().contiguous() if rows.dim() == 2 else rows,)

    def to_ours(self, theirs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Our tensor of this ``shape``, from their one tensor [in, out] (or [out], a bias)."""
        (fused,) = theirs
        rows = fused.t() if fused.dim() == 2 else fused
        return self.inner.to_ours(rows.split([part[0] for part in self.inner.shapes(shape)]), shape)

    def shapes(self, ours: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shape of their one tensor: ours reversed."""
        return (ours[::-1],)
