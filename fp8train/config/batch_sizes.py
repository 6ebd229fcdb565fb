"""Samples of each optimizer step: one number, or a ramp towards it.

Everything that counts samples or tokens of steps asks here, so that data, schedule, log and a resumed run
agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_EXACT_MICRO_BATCHES = (2**31 - 1) // (448 * 2**9)
"""Micro-batches of a step whose gradients fit into INT32 sums of E4M3 codes in units of 2^-9, the largest of
which is 448 (``precision.gradient.fp8.reduce: exact``)."""


def most_replicas(dp: int | str, cp: int, micro_batch: int, sizes: Sequence[int]) -> int:
    """The largest number of ranks among which gradients may add up, as far as settings alone tell.

    Args:
        dp: ``parallel.dp``; ``auto`` can be whatever divides the micro-batches of every step.
        cp: ``parallel.cp``.
        micro_batch: ``train.micro_batch_size``.
        sizes: global batch sizes of all steps.
    """
    return cp * (math.gcd(*sizes) // micro_batch if dp == "auto" else int(dp))


@dataclass(frozen=True)
class BatchSizes:
    """The global batch size of each optimizer step, as a function of the step.

    Attributes:
        final: global batch size after the ramp.
        ramp: (steps, global batch size) of each stage before.
    """

    final: int
    ramp: Sequence[tuple[int, int]] = ()

    @property
    def all(self) -> list[int]:
        """Every size that occurs, in order."""
        return [*(size for _, size in self.ramp), self.final]

    def size(self, step: int) -> int:
        """Number of samples of a (0-based) step."""
        for steps, size in self.ramp:
            if step < steps:
                return size
            step -= steps
        return self.final

    def samples_before(self, step: int) -> int:
        """Number of samples of all steps before this one."""
        samples = 0
        for steps, size in self.ramp:
            taken = min(step, steps)
            samples, step = samples + taken * size, step - taken
        return samples + step * self.final

    def steps_for(self, tokens: int, seq_length: int) -> int:
        """Smallest number of steps that use this many tokens."""
        done = 0
        for steps, size in self.ramp:
            needed = -(-tokens // (size * seq_length))
            if needed <= steps:
                return done + needed
            done, tokens = done + steps, tokens - steps * size * seq_length
        return done + -(-tokens // (self.final * seq_length))
