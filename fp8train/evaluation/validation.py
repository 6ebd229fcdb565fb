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

SummedLoss = Callable[[Tensor, Tensor], Tensor]
"""Forward of all micro-batches, int64 [A, B, S] inputs and targets, with the training numerics: FP64 scalar
in nats, zero on ranks without the last pipeline stage."""


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


@dataclass(frozen=True)
class Text:
    """What a model is evaluated on.

    Attributes:
        batches: samples in order, grouped for the model; this rank's share.
        num_batches: global batches to read; fewer if there are fewer.
        ignore_after: as in training.
        token_lengths: UTF-8 bytes per token id, for bits per byte; None where they are not exact.
    """

    batches: GlobalBatches
    num_batches: int
    ignore_after: int | None
    token_lengths: np.ndarray | None

    @property
    def num_samples(self) -> int:
        """Number of sequences in all batches."""
        return self.num_batches * self.batches.global_batch_size


@torch.no_grad()
def evaluate(summed_loss: SummedLoss, text: Text, processes: Processes) -> Evaluation:
    """Mean loss over a text, the same every time.

    Args:
        summed_loss: see :data:`SummedLoss`.
        text: what to read.
        processes: ranks to sum over.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for i in range(min(text.num_batches, text.batches.batches_per_epoch)):
        totals += batch_totals(summed_loss, text, i, processes)
    on_device = totals.to(processes.device)
    processes.pp.all_reduce(on_device[:1], purpose="loss")()
    processes.replicas.all_reduce(on_device, purpose="loss")()
    return evaluation_of(*on_device.tolist())


@torch.no_grad()
def batch_totals(summed_loss: SummedLoss, text: Text, number: int, processes: Processes) -> Tensor:
    """This rank's part of one global batch; arguments as for :func:`evaluate`.

    Returns:
        FP64 [3] on the CPU: nats, target tokens, bytes of target text (0 where lengths are not known).
    """
    inputs, targets = inputs_and_targets(text.batches.batch(number), text.ignore_after)
    if processes.cp.size > 1:
        inputs, targets = (ContextParallel(processes.cp).part(t) for t in (inputs, targets))
    nats = float(summed_loss(inputs.to(processes.device), targets.to(processes.device)))
    counted = targets[targets != IGNORE]
    lengths = text.token_lengths
    num_bytes = 0 if lengths is None else int(torch.from_numpy(lengths)[counted].sum())
    return torch.tensor([nats, counted.numel(), num_bytes], dtype=torch.float64)


def evaluation_of(nats: float, tokens: float, num_bytes: float) -> Evaluation:
    """The result of totals over all ranks; without bytes there are no bits per byte."""
    bits_per_byte = nats / math.log(2) / num_bytes if num_bytes else None
    return Evaluation(nats / max(1, tokens), int(tokens), bits_per_byte)
