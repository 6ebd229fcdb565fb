"""What is known about a parameter besides its values.

One :class:`ParamSpec` per fully qualified name drives initialisation, learning-rate and decay groups, the FP8
plan and checkpoints. A *parametrisation* (:mod:`fp8train.models.parametrization`) fills it from a parameter's
role and shape.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fp8train.config.optimizer_schema import DecayRule

_DRAWN_AHEAD = 8 * 2**30
"""Bytes of initial values, at most, that wait for their turn or are being drawn."""

Role = Literal["embedding", "position", "hidden", "residual_out", "head", "norm", "bias"]


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that a tensor-parallel rank holds: an equal cut along one dimension."""

    dim: int
    index: int
    count: int


@dataclass(frozen=True)
class ParamSpec:
    """What is known about one parameter besides its values.

    Attributes:
        fqn: fully qualified name; the key of everything.
        role: what it does in the decoder. ``residual_out`` projects into the residual stream.
        global_shape: shape of the logical tensor, whatever part a rank holds.
        fan_in: inputs summed by one output; 0 for vectors.
        fan_out: outputs fed by one input; 0 for vectors.
        init: distribution at initialisation.
        init_std: standard deviation for ``normal``.
        lr_mult: factor on the scheduled learning rate.
        decay: how weight decay combines with the learning rate; None is not decayed.
            ``lr_times_lambda``: ``w -= lr·λ·w`` (torch's AdamW); ``independent``: ``λ`` times the schedule,
            without the peak rate; ``fully_decoupled``: ``w -= λ·w``.
        in_fp8_plan: the linear it belongs to multiplies in FP8.
        shard: what this rank holds of it; None for all.
        sequence_partial: it is applied to parts of sequences, so that its gradient is a partial sum over
            tensor-parallel ranks.
    """

    fqn: str
    role: Role
    global_shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    init: Literal["normal", "zeros", "ones"]
    init_std: float
    lr_mult: float
    decay: DecayRule | None
    in_fp8_plan: bool = False
    shard: Shard | None = None
    sequence_partial: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part of the logical tensor."""
        shape = list(self.global_shape)
        if self.shard is not None:
            shape[self.shard.dim] //= self.shard.count
        return tuple(shape)

    @property
    def offset(self) -> tuple[int, ...]:
        """Index of this rank's first element in the logical tensor."""
        start = [0] * len(self.global_shape)
        if self.shard is not None:
            start[self.shard.dim] = self.shard.index * self.local_shape[self.shard.dim]
        return tuple(start)

    def local(self, value: Tensor) -> Tensor:
        """Cut this rank's part out of the logical tensor: a view of ``value``, of :attr:`local_shape`."""
        if self.shard is None:
            return value
        size = self.local_shape[self.shard.dim]
        return value.narrow(self.shard.dim, self.shard.index * size, size)


def initial_value(spec: ParamSpec, seed: int) -> Tensor:
    """Draw the parameter's logical value at step 0.

    A function of (seed, name, shape) only: any process layout cuts its part out of the same tensor.

    Returns:
        FP32 on the CPU, of ``spec.global_shape``.
    """
    if spec.init != "normal":
        return torch.full(spec.global_shape, 1.0 if spec.init == "ones" else 0.0)
    digest = hashlib.sha256(f"{seed}/{spec.fqn}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(spec.global_shape).normal_(0.0, spec.init_std, generator=generator)


def initial_values(specs: Iterable[ParamSpec], seed: int) -> Iterator[Tensor]:
    """:func:`initial_value` of each, in this order, drawn by as many threads as torch has.

    Each value has a generator of its own, so who draws it and when changes no bit. One draw is sequential,
    and the largest may dominate. Beside the value in use, there is one or 8 GiB of others.
    """
    threads, ahead, size = torch.get_num_threads(), deque[tuple[int, Future[Tensor]]](), 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="initial-values")
    try:
        for spec in specs:
            nbytes = 4 * math.prod(spec.global_shape)
            while ahead and (len(ahead) >= threads or size + nbytes > _DRAWN_AHEAD):
                done, value = ahead.popleft()
                size -= done
                yield value.result()
            ahead.append((nbytes, pool.submit(initial_value, spec, seed)))
            size += nbytes
        while ahead:
            yield ahead.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
