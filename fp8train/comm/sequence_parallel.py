"""Moving activations between parts of the sequence and the whole, over tensor-parallel ranks.

Between matrices each of the N tensor-parallel ranks holds 1/N of every sequence: rows ``[B, S/N]``. A
column-parallel matrix multiplies whole sequences, so its input is gathered; what row-parallel ranks compute
are partial sums of whole sequences, which are added and scattered. Rows are flattened, ``[B · S/N, K]`` and
``[B · S, K]``, batch first on both sides.

Sums run in FP32 (FP64 for FP64), in rank order, whatever travels: an all-to-all carries the same bytes as a
reduce-scatter, and rounds once. In FP8 a part travels as E4M3 codes with block scales
(:mod:`fp8train.comm.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.kernels.exchange_sum import pack, sum_parts
from fp8train.numerics.block_scales import as_blocks, from_blocks, quantize_blocks
from fp8train.precision.number_formats import E4M3
from fp8train.precision.scale_blocks import block_size
from fp8train.precision.traffic import Traffic

_NONE_IN_FP8 = Traffic()


@dataclass(frozen=True)
class Agreement:
    """Lets ranks agree on what each knows of its part of a tensor (or of its rows), as if one process had the
    whole.

    Attributes:
        group: the ranks with other parts.
    """

    group: CountedGroup

    def largest(self, amax: Tensor) -> Tensor:
        """The elementwise largest amax (FP32, any shape). NaN counts as infinity, which a maximum keeps."""
        amax = amax.nan_to_num(nan=torch.inf, posinf=torch.inf).contiguous()
        self.group.all_reduce(amax, purpose="amax", op=dist.ReduceOp.MAX)()
        return amax

    def total(self, counts: Tensor) -> Tensor:
        """The elementwise sum of integer counts over the group, a new tensor."""
        counts = counts.clone()
        self.group.all_reduce(counts, purpose="mse_counts")()
        return counts


@dataclass(frozen=True)
class TensorParallel:
    """The ranks among which matrices and sequences are cut.

    Attributes:
        group: ranks with other parts of the same matrices.
        shards: ranks that hold other parts of the same activation: ``group``, and context-parallel ranks.
        context: context-parallel ranks: those with other tokens of the same sequences.
        traffic: what travels in FP8.
    """

    group: CountedGroup
    shards: CountedGroup
    context: CountedGroup
    traffic: Traffic = _NONE_IN_FP8

    @property
    def size(self) -> int:
        """Number of tensor-parallel ranks N."""
        return self.group.size

    @property
    def rank(self) -> int:
        """This process's place among them, 0 to N - 1."""
        return self.group.rank

    def agreement(self, *, tp: bool, cp: bool) -> Agreement | None:
        """The agreement among ranks that hold parts of one tensor; None if this one has the whole.

        Args:
            tp: tensor-parallel ranks have other parts.
            cp: context-parallel ranks have.
        """
        if tp and cp:
            group = self.shards
        elif tp or cp:
            group = self.group if tp else self.context
        else:
            return None
        return Agreement(group) if group.size > 1 else None

    def gather(self, x: Tensor, *, batch: int, purpose: str) -> Callable[[], Tensor]:
        """Start an all-gather of whole sequences from the parts that the ranks hold.

        Args:
            x: [batch · S/N, K], any dtype; FP8 travels as bytes.
            batch: sequences.
            purpose: name in the byte counters.

        Returns:
            A function that waits for the result, [batch · S, K].
        """
        sent = x.contiguous()
        raw = sent.view(torch.uint8) if sent.element_size() == 1 else sent
        gathered = raw.new_empty(self.size, *raw.shape)
        wait = self.group.all_gather(gathered, raw, purpose=purpose)

        def result() -> Tensor:
            wait()
            rows = gathered.view(self.size, batch, -1, raw.shape[1]).transpose(0, 1)
            return rows.reshape(-1, raw.shape[1]).view(x.dtype)

        return result

    def scatter_sum(self, partial: Tensor, *, batch: int, fp8: bool, purpose: str) -> Callable[[], Tensor]:
        """Start to add partial sums and keep this rank's part of every sequence.

        Args:
            partial: [batch · S, K].
            batch: sequences.
            fp8: send E4M3 codes with block scales.
            purpose: name in the byte counters.

        Returns:
            A function that waits for the result, [batch · S/N, K] in partial's dtype.
        """
        width, dtype = partial.shape[1], partial.dtype
        parts = partial.view(batch, self.size, -1, width).transpose(0, 1).reshape(-1, width)
        shape = (parts.shape[0] // self.size, width)
        if fp8:
            return self._scatter_fp8(parts, shape, purpose)
        sent = parts.view(self.size, -1)
        received = torch.empty_like(sent)
        wait = self.group.all_to_all(received.view(torch.uint8), sent.view(torch.uint8), purpose=purpose)

        def result() -> Tensor:
            wait()
            total = received[0].to(torch.promote_types(dtype, torch.float32), copy=True)
            for part in received[1:]:
                total += part
            return total.view(shape).to(dtype)

        return result

    def _scatter_fp8(self, parts: Tensor, shape: tuple[int, int], purpose: str) -> Callable[[], Tensor]:
        block = block_size(shape[1])
        message = pack(*quantize_blocks(as_blocks(parts, block), E4M3), self.size)
        received = torch.empty_like(message)
        wait = self.group.all_to_all(received, message, purpose=purpose)

        def result() -> Tensor:
            wait()
            return from_blocks(sum_parts(received, block, E4M3), shape).to(parts.dtype)

        return result
