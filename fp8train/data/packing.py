"""Conversations to sequences of ``seq_length + 1`` tokens, of which some are targets.

**Packing.** Conversations of a split are taken in a seeded random order (validation: file order), and each
goes where it leaves the least room: best fit, a linear pass. None crosses a sequence, unless it is longer
than one: then it is cut into pieces of ``seq_length``, and each further piece opens a sequence, after the
token it follows. Pieces without a target are left out. Cuts and fill are part of the description, which a run
prints. The packing is the same in every epoch, so an epoch has a fixed number of sequences; their order is
drawn anew. ``packing: none`` gives every conversation a sequence of its own.

**Layout.** An end-of-document id, then conversations, each of which ends with one, then such ids as padding:
every token of a conversation has the predecessor that it would have in pretraining.

**Attention** is causal over the whole sequence: a conversation sees those packed before it, as documents do
in pretraining. A mask by document would have to reach every pipeline stage and attention backend; whoever
wants conversations apart pays with padding instead (``packing: none``).

**Targets travel in the sign.** A token that is not a target is stored as its complement ``~t = -1 - t``, so a
sample stays one int64 array and everything between here and the split into inputs and targets
(:func:`fp8train.step.targets.inputs_and_targets`) handles it as before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, out_of_vocab
from fp8train.data.permutation import Permutation
from fp8train.data.samples import Place, epoch_and_number

_PACKING_KEY = 3  # samples.py draws with 1 and 2


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one conversation, as their place in the file.

    Attributes:
        start: first token in the file.
        stop: after the last one.
        continues: whether the conversation began before.
    """

    start: int
    stop: int
    continues: bool

    def __len__(self) -> int:
        return self.stop - self.start


def pack(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """Best fit, in order: each piece into the sequence that it fills best.

    Args:
        pieces: none longer than ``capacity``; one that continues always opens a sequence.
        capacity: tokens of a sequence.
    """
    packed: list[list[Piece]] = []
    with_room: dict[int, list[int]] = {}  # free tokens: sequences
    rooms = 0  # bit n: some sequence has n free tokens
    for piece in pieces:
        fitting = rooms >> len(piece)
        if piece.continues or not fitting:
            packed.append([piece])
            number, room = len(packed) - 1, capacity - len(piece)
        else:
            free = len(piece) + (fitting & -fitting).bit_length() - 1
            number, room = with_room[free].pop(), free - len(piece)
            if not with_room[free]:
                rooms &= ~(1 << free)
            packed[number].append(piece)
        if room:
            with_room.setdefault(room, []).append(number)
            rooms |= 1 << room
    return packed


class PackedSamples:
    """Sequences of a range of conversations; implements :class:`fp8train.data.samples.Samples`.

    Args:
        dataset: where the tokens are.
        mask: uint8 [tokens of the dataset]: 1 for targets.
        eod_id: fills up.
        documents: ``(first, last + 1)``.
        seq_length: S; samples hold S + 1 tokens.
        seed: of packing and order.
        shuffle: False packs and reads in file order.
        share: several conversations may share a sequence.
        split: name of the range, for messages.

    Attributes:
        samples_per_epoch: sequences.
        num_cut: conversations longer than a sequence.
        num_dropped: pieces of them without a target.

    Raises:
        DataError: the range holds no target.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        mask: np.ndarray,
        *,
        eod_id: int,
        documents: tuple[int, int],
        seq_length: int,
        seed: int,
        shuffle: bool,
        share: bool,
        split: str,
    ) -> None:
        self.dataset, self.documents, self.seq_length = dataset, documents, seq_length
        self._mask, self._eod_id, self._split = mask, eod_id, split
        self._seed, self._shuffle, self._share = seed, shuffle, share
        self.num_cut = self.num_dropped = 0
        pieces = self._pieces()
        self._packed = pack(pieces, seq_length) if share else [[piece] for piece in pieces]
        self.samples_per_epoch = len(self._packed)
        if not self._packed:
            raise DataError(
                f"{dataset.prefix} ({split}): no conversation with a target\n"
                "give more conversations or a larger share in `split`"
            )

    def _pieces(self) -> list[Piece]:
        first, end = self.documents
        count = end - first
        order = np.arange(count)
        if self._shuffle and count:
            order = Permutation(count, (self._seed, 0, _PACKING_KEY))[order]
        before = np.concatenate([[0], np.cumsum(self._mask, dtype=np.int64)])
        pieces = []
        for number in (first + order).tolist():
            start, stop = (int(offset) for offset in self.dataset.document_offsets[number : number + 2])
            self.num_cut += stop - start > self.seq_length
            for begin in range(start, stop, self.seq_length):
                piece = Piece(begin, min(begin + self.seq_length, stop), begin > start)
                if before[piece.stop] > before[piece.start]:
                    pieces.append(piece)
                else:
                    self.num_dropped += 1
        return pieces

    @cached_property  # asked for at every checkpoint
    def description(self) -> str:
        """Name, size and packing, for messages."""
        first, end = self.documents
        offsets = self.dataset.document_offsets
        targets = int(self._mask[offsets[first] : offsets[end]].sum())
        filled = sum(len(piece) for packed in self._packed for piece in packed)
        share = filled / (len(self._packed) * self.seq_length)
        cut = f", {self.num_cut} longer than a sequence were cut" if self.num_cut else ""
        if self.num_dropped:
            cut += f" ({self.num_dropped} pieces without a target left out)"
        return (
            f"{self.dataset.prefix} ({self._split}: {end - first} conversations, "
            f"{int(offsets[end] - offsets[first])} tokens, {targets} targets; "
            f"{share:.1%} of {len(self._packed)} sequences filled{cut})"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the samples and their order."""
        parts = (
            self.dataset.fingerprint(),
            hashlib.sha256(self._mask.tobytes()).hexdigest(),
            self.documents,
            self.seq_length,
            self._shuffle and self._seed,
            self._shuffle,
            self._share,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample ``index >= 0`` of the global order: int64 ``[seq_length + 1]``, complemented where no
        target.
        """
        packed = self._packed[self._number(index)]
        sample = np.full(self.seq_length + 1, ~self._eod_id, dtype=np.int64)
        if packed[0].continues:
            sample[0] = ~int(self.dataset.tokens(packed[0].start - 1, packed[0].start)[0])
        filled = 1
        for piece in packed:
            tokens = self.dataset.tokens(piece.start, piece.stop).astype(np.int64)
            if int(tokens.min()) < 0:  # its complement would look like a token
                position = piece.start + int(np.argmax(tokens < 0))
                bad, place = int(tokens.min()), self.dataset.place(position)
                raise out_of_vocab(self.dataset.prefix, *place, bad, np.iinfo(self.dataset.dtype).max)
            learnt = self._mask[piece.start : piece.stop] == 1
            sample[filled : filled + len(piece)] = np.where(learnt, tokens, ~tokens)
            filled += len(piece)
        return sample

    def place(self, index: int, position: int) -> Place:
        """Where token ``position`` of sample ``index`` comes from."""
        packed = self._packed[self._number(index)]
        token = packed[0].start - (1 if packed[0].continues else 0)
        filled = 1
        for piece in packed:
            if filled <= position < filled + len(piece):
                token = piece.start + position - filled
            filled += len(piece)
        return Place(self.dataset.prefix, *self.dataset.place(token))

    def _number(self, index: int) -> int:
        return epoch_and_number(index, self.samples_per_epoch, self._seed if self._shuffle else None)[1]
