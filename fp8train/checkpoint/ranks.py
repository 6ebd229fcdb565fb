"""Steps that all ranks take or refuse together.

Saving and loading touch the file system on every rank, and any of them can fail alone. If one rank raised
while its peers waited in the next collective, the job would hang until the process-group timeout and blame an
innocent rank. So every such step runs through :meth:`Ranks.each`: outcomes are exchanged, and a failure
anywhere is raised everywhere. The price is one small object all-gather per step, nothing next to file I/O.

torch is imported where there is a group: one process looks at files without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fp8train.checkpoint.errors import CheckpointError, explain_os_error
from fp8train.comm.calls import Calls, GroupCalls
from fp8train.config.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome:
    value: object = None
    error: Exception | None = None


class Ranks:
    """The processes that save or load together; ``group=None`` is one process without a process group."""

    def __init__(self, group: dist.ProcessGroup | None, calls: GroupCalls | None = None) -> None:
        """``calls``: where exchanges over ``group`` are counted; for the main thread's groups."""
        self.group = group
        self._calls = Calls().group("files", ()) if calls is None else calls
        self.rank, self.size = 0, 1
        if group is not None:
            import torch.distributed as dist

            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that touches shared files."""
        return self.rank == 0

    def each(self, step: Callable[[], T]) -> list[T]:
        """Run ``step`` on every rank and return all results, which must pickle, in rank order.

        Raises on every rank if any failed: a :class:`CheckpointError` (or its subclass) that names the rank
        for what users can fix, the original exception on the rank of a bug and ``RuntimeError`` on its peers.
        """
        return self._exchange(step, share=True)[1]

    def agree(self, step: Callable[[], T]) -> T:
        """Run ``step`` on every rank and return this rank's result; only failures travel, and are raised as
        in :meth:`each`.
        """
        return self._exchange(step, share=False)[0]

    def first(self, step: Callable[[], T]) -> T:
        """Run ``step`` on rank 0 only and return its result on every rank; failures as in :meth:`each`."""
        return self.each(lambda: step() if self.is_first else None)[0]  # type: ignore[return-value]

    def _exchange(self, step: Callable[[], T], *, share: bool) -> tuple[T, list[T]]:
        own: Exception | None = None
        value: T | None = None
        try:
            value = step()
            outcome = _Outcome(value=value if share else None)
        except Exception as error:  # not swallowed: raised below, once the peers know
            own = error
            outcome = _Outcome(error=portable(error, f"rank {self.rank}: " if self.size > 1 else ""))
        outcomes = [outcome]
        if self.group is not None:
            import torch.distributed as dist

            outcomes = [_Outcome()] * self.size
            with self._calls.held("exchange of outcomes"):
                dist.all_gather_object(outcomes, outcome, group=self.group)
        failure = next((one.error for one in outcomes if one.error is not None), None)
        if failure is not None:
            if own is not None and not isinstance(own, UserError | OSError):
                raise own
            raise failure from own
        return value, [one.value for one in outcomes]  # type: ignore[misc, return-value]


def portable(error: BaseException, where: str) -> Exception:
    """``error`` in a form that pickles and makes sense on another rank: its message begins with ``where``."""
    if isinstance(error, UserError):
        return type(error)(f"{where}{error}")
    if isinstance(error, OSError):
        return CheckpointError(f"{where}{explain_os_error(error)}")
    return RuntimeError(f"{where}{type(error).__name__}: {error}")
