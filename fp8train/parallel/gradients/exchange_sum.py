"""Sums over ranks of FP8 codes with block scales, on one level or two; see :mod:`fp8train.comm.exchange`.

Everyone receives codes of the sums, rounded a second time; owners receive the FP32 sums themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.comm.exchange import Exchange, HierarchicalExchange
from fp8train.numerics.blocks import from_blocks
from fp8train.parallel.gradients.block_storage import BlockStorage
from fp8train.parallel.gradients.held import Held, HeldValues

_UNIT_SCALE = 127  # the E8M0 byte of 1


class ExchangeSum:
    """Reduces a bucket by FP8 exchange: FP8 on the wire, FP32 in the sum (a
    :class:`~fp8train.parallel.gradients.bucket.Reduction`)."""

    def __init__(self, storage: BlockStorage, exchange: Exchange | HierarchicalExchange | None) -> None:
        """Args: ``exchange``: over the ranks; None for one rank."""
        self._storage, self._exchange = storage, exchange
        self._sums: Tensor | None = None

    def start(self) -> None:
        """Cast this rank's sums to FP8 and send every rank its part."""
        payload, scales = self._storage.codes()
        if self._exchange is not None:
            places = self._storage.places
            codes = places.arrange(payload.view(torch.uint8)).view(payload.dtype)
            self._exchange.start(codes, places.arrange(scales, fill=_UNIT_SCALE))

    def advance(self) -> None:
        """Add what arrived, and send the sums to everyone if everyone is to have them."""
        if self._exchange is not None:
            scattered = self._storage.places.scattered
            sums = self._exchange.advance(gather=not scattered)
            self._sums = sums if scattered else None

    def finish(self) -> Held:
        """Wait for the sums: codes in the storage where everyone receives them, else this rank's rows in
        FP32."""
        if self._exchange is None:
            return self._storage.hold_codes(*self._storage.stored())
        if self._sums is None:
            return self._storage.hold_codes(*self._exchange.finish())
        places, sums = self._storage.places, self._sums
        self._sums = None
        parts = [from_blocks(sums[place], places.held_shape(i)) for i, place in enumerate(places.held)]
        return HeldValues([part.contiguous() for part in parts])  # a copy where rows end in short blocks
