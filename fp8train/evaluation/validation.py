"""Validation: the mean loss on a fixed set of batches, with the numerics of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.processes import Processes
from fp8train.data.batches import GlobalBatches
from fp8train.layers.loss import IGNORE
from fp8train.step.targets import inputs_and_targets


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        loss: mean nats per target token.
        tokens: target tokens.
        bits_per_byte: bits per UTF-8 byte of the target text; None where token lengths are not known.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None

    def metrics(self) -> dict[str, float]:
        """Loss, perplexity and bits per byte under their names in the log."""
        values = {"eval/loss": self.loss, "eval/perplexity": math.exp(min(self.loss, 700.0))}
        if self.bits_per_byte is not None:
            values["eval/bits_per_byte"] = self.bits_per_byte
        return values


@torch.no_grad()
def evaluate(
    summed_loss: Callable[[Tensor, Tensor], Tensor],
    batches: GlobalBatches,
    *,
    num_batches: int,
    processes: Processes,
    token_lengths: np.ndarray | None,
    ignore_after: int | None,
) -> Evaluation:
    """Mean loss over the first ``num_batches`` global batches (fewer if there are fewer), the same every
    time.

    Args:
        summed_loss: forward of all micro-batches, int64 [A, B, S] inputs and targets, with the training
            numerics: FP64 scalar in nats, zero on ranks without the last pipeline stage.
        batches: this rank's share of a split.
        num_batches: global batches.
        processes: ranks to sum over.
        token_lengths: UTF-8 bytes per token id, for bits per byte; None leaves it out.
        ignore_after: as in training.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for i in range(min(num_batches, batches.batches_per_epoch)):
        totals += batch_totals(
            summed_loss,
            batches,
            i,
            processes=processes,
            token_lengths=token_lengths,
            ignore_after=ignore_after,
        )
    on_device = totals.to(processes.device)
    processes.pp.all_reduce(on_device[:1], purpose="loss")()
    processes.replicas.all_reduce(on_device, purpose="loss")()
    return evaluation_of(*on_device.tolist())


@torch.no_grad()
def batch_totals(
    summed_loss: Callable[[Tensor, Tensor], Tensor],
    batches: GlobalBatches,
    number: int,
    *,
    processes: Processes,
    token_lengths: np.ndarray | None,
    ignore_after: int | None,
) -> Tensor:
    """This rank's part of one global batch; arguments as for :func:`evaluate`.

    Returns:
        FP64 [3] on the CPU: nats, target tokens, bytes of target text (0 where lengths are not known).
    """
    inputs, targets = inputs_and_targets(batches.batch(number), ignore_after)
    if processes.cp.size > 1:
        inputs, targets = (ContextParallel(processes.cp).part(t) for t in (inputs, targets))
    nats = float(summed_loss(inputs.to(processes.device), targets.to(processes.device)))
    counted = targets[targets != IGNORE]
    num_bytes = 0 if token_lengths is None else int(torch.from_numpy(token_lengths)[counted].sum())
    return torch.tensor([nats, counted.numel(), num_bytes], dtype=torch.float64)


def evaluation_of(nats: float, tokens: float, num_bytes: float) -> Evaluation:
    """The result of totals over all ranks; without bytes there are no bits per byte."""
    bits_per_byte = nats / math.log(2) / num_bytes if num_bytes else None
    return Evaluation(nats / max(1, tokens), int(tokens), bits_per_byte)
