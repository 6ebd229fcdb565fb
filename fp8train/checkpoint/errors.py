"""What can go wrong with a checkpoint, as messages for the person who runs the job."""

import errno

from fp8train.config.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written, found or loaded as asked."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are not what was written (or not safe to read). Another checkpoint may still be
    good.
    """


class OtherFormatError(CheckpointError):
    """A checkpoint is whole, but of a format that this program does not know. It is no damage: it is never
    passed over, replaced or deleted.
    """


class NotFiniteError(CheckpointError):
    """What was to be saved is NaN or infinite."""


class NoGoodCheckpointError(CheckpointError):
    """There are checkpoints where one was looked for, and all are damaged."""


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or lower `keep_last`",
    errno.EDQUOT: "the disk quota is used up; free some space or lower `keep_last`",
    errno.EFBIG: "the file would pass the size limit of this process or file system (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted",
}


def explain_os_error(error: OSError) -> str:
    """``path: reason`` for an operating-system error, with the remedy where there is one."""
    reason = _REMEDIES.get(error.errno or 0) or (error.strerror or str(error)).lower()
    return f"{error.filename}: {reason}" if error.filename else reason


def find_os_error(error: BaseException) -> OSError | None:
    """The operating-system error behind ``error``, found along its chain of causes; None if there is none.

    A full disk reaches us as ``RuntimeError: unexpected pos ...`` from torch's archive writer, raised while
    it closes the file; the real cause is further down the chain.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def shorten(lines: list[str], *, limit: int = 3) -> str:
    """At most ``limit`` of ``lines``, then how many more there are: error messages stay readable for big
    models.
    """
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
