"""Global batches: which samples a rank trains on at a step, as a pure function of the step.

Step t uses samples ``[t G, (t + 1) G)`` of the global order. They are cut into ``G / B`` micro-batches of B
consecutive samples, and rank r of R takes the contiguous block ``[r A, (r + 1) A)`` of them, ``A = G / (B
R)``. So the union over ranks is the same for every R, the position of a run is its step, and a run may
continue on another number of ranks.

Stretches of the global order may be left out, because training went wrong on them: then the samples that are
used are counted without them, and everything above holds for the count.

G may grow in a ramp; a run that is continued with another G goes on from the sample that it had reached. Then
a step begins where the samples of all steps before end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8train.config.batch_sizes import BatchSizes
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import out_of_vocab
from fp8train.data.samples import Samples

if TYPE_CHECKING:
    import torch


class GlobalBatches:
    """A rank's view of the global batches of one split.

    Args:
        samples: The global order.
        global_batch_size: G, samples per step over all ranks; like those of the ramp a multiple of B R.
        micro_batch_size: B, samples per forward pass.
        ramp: (steps, size) of smaller global batches at the start, G after them.
        dp_rank: r.
        dp_size: R.
        vocab_size: Tokens must be in ``[0, vocab_size)``; checked on the CPU for every batch, because on a
            GPU an id outside the embedding is a device assertion without a name.
        masked: Whether samples hold complemented tokens, which are no targets
            (:mod:`fp8train.data.packing`).

    Attributes:
        batches_per_epoch: Global batches before samples repeat.
        left_out: Samples ``first .. stop`` of the global order that are not used, sorted and apart.

    Raises:
        DataError: The samples do not fill one global batch.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        ramp: Sequence[tuple[int, int]] = (),
        masked: bool = False,
    ) -> None:
        self._sizes = BatchSizes(global_batch_size, ramp)
        for size in self._sizes.all:
            assert size % (micro_batch_size * dp_size) == 0, (size, micro_batch_size, dp_size)
        assert 0 <= dp_rank < dp_size
        if samples.samples_per_epoch < global_batch_size:
            raise DataError(
                f"{samples.description}: too small for one global batch\n"
                f"needed: {global_batch_size} samples of {samples.seq_length} tokens (`global_batch_size`); "
                f"present: {samples.samples_per_epoch}\n"
                "give more text or a larger share in `split`, or lower `global_batch_size` or `seq_length`"
            )
        self.samples = samples
        self.seq_length = samples.seq_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.batches_per_epoch = samples.samples_per_epoch // global_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._start_step = self._start_sample = 0
        self._vocab_size, self._masked = vocab_size, masked
        self.left_out: list[tuple[int, int]] = []

    def batch(self, step: int) -> torch.Tensor:
        """Read this rank's micro-batches of one step.

        Args:
            step: Optimizer steps done before this one; any number >= 0, samples repeat after an epoch.

        Returns:
            int64 ``[A, B, seq_length + 1]`` on the CPU; complemented where ``masked`` and no target.

        Raises:
            DataError: A token is outside the vocabulary; names dataset, document and offset.
        """
        import torch  # not needed to see whether the data will do, before a run

        count = self._sizes.size(step) // self._dp_size
        first = self.samples_before(step) + self._dp_rank * count
        places = [self._place(first + number) for number in range(count)]
        tokens = np.stack([self.samples[place] for place in places])
        ids = np.where(tokens < 0, ~tokens, tokens) if self._masked else tokens
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            number, position = np.argwhere((ids < 0) | (ids >= self._vocab_size))[0].tolist()
            place = self.samples.place(places[number], position)
            token = int(ids[number, position])
            raise out_of_vocab(place.prefix, place.document, place.offset, token, self._vocab_size)
        shape = (count // self.micro_batch_size, self.micro_batch_size, self.seq_length + 1)
        return torch.from_numpy(tokens).view(shape)

    def samples_before(self, step: int) -> int:
        """Samples that all ranks have used before ``step``; the first one of its batch."""
        planned = self._sizes.samples_before
        return self._start_sample + planned(step) - planned(self._start_step)

    def _place(self, used: int) -> int:
        """Where in the global order the sample lies that is used after ``used`` others."""
        for first, stop in self.left_out:
            if used < first:
                break
            used += stop - first
        return used

    def stretch(self, first: int, stop: int) -> tuple[int, int]:
        """The samples of the global order from the batch of step ``first`` to that of step ``stop``, which is
        not among them."""
        return self._place(self.samples_before(first)), self._place(self.samples_before(stop) - 1) + 1

    def leave_out(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Use these samples, ``first .. stop`` of the global order, no more. Only such as no step before the
        current one has used."""
        merged: list[tuple[int, int]] = []
        for first, stop in sorted([*self.left_out, *stretches]):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((first, stop))
        self.left_out = merged

    def state_dict(self, step: int) -> dict[str, Any]:
        """Position after ``step`` steps, for a checkpoint: plain values, the same on every rank."""
        return {
            "step": step,
            "samples": self.samples_before(step),
            "left_out": [list(stretch) for stretch in self.left_out],
            "global_batch_size": self.global_batch_size,
            "seq_length": self.seq_length,
            "dataset": self.samples.description,
            "fingerprint": self.samples.fingerprint,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a position belongs to this data.

        Raises:
            DataError: Sequence length, data, split or seed differ from the checkpoint's.
        """
        if state["seq_length"] != self.seq_length:
            raise DataError(
                f"`seq_length` is {self.seq_length}, but the checkpoint's data position was counted with "
                f"{state['seq_length']}\n"
                "set `seq_length` back to continue this run, or start a new one"
            )
        if state["fingerprint"] != self.samples.fingerprint:
            raise DataError(
                "the data is not what the checkpoint was trained on (content, split, blend weights or "
                "shuffle seed)\n"
                f"  checkpoint: {state['dataset']}, fingerprint {state['fingerprint'][:16]}\n"
                f"  now:        {self.samples.description}, fingerprint {self.samples.fingerprint[:16]}\n"
                "restore the dataset and the settings, or start a new run"
            )

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Check that a position belongs to this data, go on from it, and return its step.

        Raises:
            DataError: See :meth:`check_state_dict`.
        """
        self.check_state_dict(state)
        self._start_step = int(state["step"])
        # Earlier versions did not record the samples: their batches had one size from the start.
        self._start_sample = int(state.get("samples", self._start_step * state["global_batch_size"]))
        self.left_out = [(first, stop) for first, stop in state.get("left_out", [])]
        return self._start_step
