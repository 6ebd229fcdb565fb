"""DCP's file storage with our rules: errors that name the cause, an index read without pickle, nothing about
this machine.

Each rank writes one shard file. The classes below change four things of torch's: a full disk is reported as
such (torch says ``unexpected pos``), the index does not record the temporary path, an incomplete plan is
caught before the index is written, and the index is one that :mod:`fp8train.checkpoint.safe_metadata` has
already checked.
"""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fp8train.checkpoint.errors import (
    CheckpointError,
    CorruptCheckpointError,
    explain_os_error,
    find_os_error,
)
from fp8train.checkpoint.ranks import portable
from fp8train.config.errors import UserError

_COPY_AHEAD_BYTES = 10_000_000
"""Of tensors on a device that are copied to the host while others are written; torch's default."""


class ShardWriter(FileSystemWriter):
    """Writes one synced shard file per rank, then the index."""

    def __init__(self, path: Path, *, in_thread: bool = False) -> None:
        """``in_thread``: all tensors are on the host; never look at the current CUDA device, which in a
        new thread is another one than training's."""
        super().__init__(
            path,
            single_file_per_rank=True,
            sync_files=True,
            overwrite=False,
            per_thread_copy_ahead=0 if in_thread else _COPY_AHEAD_BYTES,
        )
        self._directory = path

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: equal states give equal files, wherever and whenever they are saved."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard; file-system failures become :class:`CheckpointError`."""
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            cause = find_os_error(error)
            if cause is None:
                raise
            raise CheckpointError(f"cannot write {self._directory}: {explain_os_error(cause)}") from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, after checking that every planned rectangle was written."""
        planned = {
            MetadataIndex(key, chunk.offsets)
            for key, tensor in metadata.state_dict_metadata.items()
            for chunk in tensor.chunks  # type: ignore[union-attr]
        }
        written = [result.index for rank_results in results for result in rank_results]
        assert set(written) == planned, "written shards differ from the plan"
        assert len(written) == len(planned), "a shard was written twice"
        super().finish(metadata, results)


class ShardReader(FileSystemReader):
    """Reads tensors (``weights_only``) through an index that was checked before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._directory = path
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index that was checked before; nothing is read."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's rectangles; unreadable shards become :class:`CorruptCheckpointError`."""
        try:
            return super().read_data(plan, planner)
        except (OSError, RuntimeError, AssertionError, EOFError, pickle.UnpicklingError) as error:
            first_line = str(error).strip().split("\n", 1)[0]
            raise CorruptCheckpointError(
                f"cannot read the shards of {self._directory}: {first_line}"
            ) from error


def ignore_single_process_warning() -> None:
    """Silence DCP's warning that it saves without a process group: that is how we asked it to."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@contextmanager
def dcp_call(*, in_thread: bool = False) -> Iterator[None]:
    """Wrap a DCP call: its cross-rank exception becomes one that our callers know.

    DCP has already made sure that every rank raises. What users can fix stays a :class:`CheckpointError` with
    the first failing rank's message; anything else is a bug and keeps DCP's text with all tracebacks.

    ``in_thread``: leave the warnings filter, which is the process's, as it is.
    """
    try:
        with nullcontext() if in_thread else warnings.catch_warnings():
            if not in_thread:
                ignore_single_process_warning()
            yield
    except CheckpointException as error:
        failures = error.failures
        for rank, (cause, _) in sorted(failures.items()):
            if isinstance(cause, UserError | OSError):
                raise portable(cause, f"rank {rank}: " if rank or len(failures) > 1 else "") from cause
        raise RuntimeError(str(error)) from error
