"""Copies in host memory of what this rank writes: training goes on while they are saved.

The copy is the whole stall of an asynchronous save, so it should be one pass over memory and nothing else.
Ranks agree once on who writes which rectangle, by the rule that the save itself follows; each then copies
only its own share. A replicated state costs every rank 1/N of its bytes, not all of them, and shard files are
those of a synchronous save. The buffers stay between saves, page-locked where the tensors live on a CUDA
device: the price is host memory of the size of this rank's shard for the rest of the run.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.readback import Keys, describe
from fp8train.checkpoint.save import RANK_STATE_PREFIX


class HostSnapshot:
    """Buffers in host memory for what one rank writes of a checkpoint.

    Attributes:
        num_bytes: of the buffers; 0 before the first :meth:`take`.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._structure: Keys | None = None
        self._buffers: dict[str, Tensor] = {}
        self._own: frozenset[str] = frozenset()

    def take(self, tensors: Mapping[str, LogicalTensor], ranks: Ranks) -> dict[str, LogicalTensor]:
        """Copy what this rank writes of ``tensors`` and wait for the copies. Collective over ``ranks`` the
        first time.

        The result is valid until the next call, which must come with the same tensors; those of this rank
        alone (``rank_state/``) may change their shapes and are copied afresh.
        """
        shared = {name: one for name, one in tensors.items() if not name.startswith(RANK_STATE_PREFIX)}
        if self._structure is None:  # collective: also on a rank that turns out to write nothing
            self._plan(tensors, ranks)
            self._structure = describe(shared)
        assert describe(shared) == self._structure, "a snapshot of other tensors"
        copies: dict[str, LogicalTensor] = {}
        waiting: set[torch.device] = set()
        for name, value in tensors.items():
            if name not in self._own:
                continue
            source = value.local.detach()
            if name in shared:
                buffer = self._buffers[name]
                buffer.copy_(source, non_blocking=True)
                if source.is_cuda:
                    waiting.add(source.device)
            else:
                buffer = source.to("cpu", copy=True)
            copies[name] = LogicalTensor(buffer, value.global_shape, value.offset)
        for device in waiting:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _plan(self, tensors: Mapping[str, LogicalTensor], ranks: Ranks) -> None:
        from fp8train.checkpoint.planners import choose_writers, write_items  # slow to import

        offers = ranks.each(lambda: write_items(tensors))
        self._own = frozenset(item.index.fqn for item in choose_writers(offers)[ranks.rank])
        for name in self._own:
            source = tensors[name].local
            if not name.startswith(RANK_STATE_PREFIX):
                self._buffers[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self.num_bytes = sum(buffer.nbytes for buffer in self._buffers.values())
