"""Sums over ranks of FP8 codes with block scales, on one level or two; see :mod:`fp8train.comm.exchange`.

Everyone receives codes of the sums, rounded a second time; owners receive the FP32 sums themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.comm.exchange import Exchange, HierarchicalExchange
from fp8train.numerics.block_scales import from_blocks
from fp8train.parallel.gradients.block_storage import BlockStorage
from fp8train.parallel.gradients.held import Held, HeldValues


class ExchangeSum:
    """Reduces a bucket by FP8 exchange: FP8 on the wire, FP32 in the sum (a
    :class:`~fp8train.parallel.gradients.bucket.Reduction`)."""

    def __init__(self, storage: BlockStorage, exchange: Exchange | HierarchicalExchange | None) -> None:
        """Args: ``exchange``: over the ranks; None for one rank."""
        self._storage, self._exchange = storage, exchange
        self._order: Tensor | None = None
        places = storage.places
        if exchange is not None and places.scattered:
            # Messages are arranged by owner, and parts are padded: -1.
            blocks = torch.arange(places.total, dtype=torch.int32, device=storage.device)
            self._order = places.arrange(blocks, fill=-1)
        self._sums: Tensor | None = None

    def start(self) -> None:
        """Cast this rank's sums to FP8 and send every rank its part."""
        # Micro-batches were added in high precision; their sum is cast here, or was when there was one alone.
        # The storage owns codes [blocks, block] and scales [blocks], which the next step overwrites.
        payload, scales = self._storage.codes()
        if self._exchange is not None:
            # By receiving rank; under ZeRO that is by owner, and parts are padded with zeros of scale 1.
            self._exchange.start(payload, scales, order=self._order)

    def advance(self) -> None:
        """Add what arrived, and send the sums to everyone if everyone is to have them."""
        if self._exchange is None:
            return
        if self._storage.places.scattered:
            self._sums = self._exchange.sums()  # FP32, this rank's part
        else:
            self._exchange.advance()

    def finish(self) -> Held:
        """Wait for the sums: codes in the storage where everyone receives them, else this rank's rows in
        FP32."""
        if self._exchange is None:  # one rank: its own codes are the result
            return self._storage.hold_codes()
        if self._sums is None:  # everyone receives: codes of all sums, kept in the storage
            self._exchange.finish(into=self._storage.stored())
            return self._storage.hold_codes()
        # Owners: FP32 sums of this rank's rows, never cast again and freed after the optimizer has read them.
        places, sums = self._storage.places, self._sums
        self._sums = None
        parts = [from_blocks(sums[place], places.held_shape(i)) for i, place in enumerate(places.held)]
        return HeldValues([part.contiguous() for part in parts])  # a copy where rows end in short blocks
