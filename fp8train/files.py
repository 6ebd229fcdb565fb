"""Durable and atomic file operations.

A rename is atomic but not durable: after a power cut a renamed file may be empty unless its bytes were synced
before, and the name itself may be gone unless the directory was synced after. Every function here does both.
"""

import errno
import os
import shutil
import threading
from pathlib import Path

TMP_SUFFIX = ".tmp"
NFS_PREFIX = ".nfs"
"""Of what an NFS client makes of a file that was deleted while a process has it open."""


def fsync_dir(path: Path) -> None:
    """Make the names inside directory ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def write_durable(path: Path, data: bytes) -> None:
    """Write ``data`` and sync it. Not atomic: for files in a directory that is renamed as a whole."""
    try:
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        # Writing and syncing, unlike opening, fail without the file's name.
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically and durably: a reader sees the old bytes or the new ones, nothing between.

    On failure the old file is untouched and the temporary one is removed.
    """
    tmp = path.with_name(f".{path.name}.{threading.get_native_id()}{TMP_SUFFIX}")
    try:
        write_durable(tmp, data)
        tmp.rename(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def overwrite_file(path: Path, data: bytes) -> None:
    """Put ``data`` in place of what ``path`` holds without asking the disk for room: a file of up to a block
    (4 KiB) keeps its block. Not atomic, and no file is made: for when :func:`replace_file` failed.
    """
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        before = os.fstat(fd).st_size
        os.pwrite(fd, data.ljust(before), 0)  # blanks after it: at no moment is there half of the old text
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)


def append_file(path: Path, data: bytes) -> None:
    """Append ``data`` in one write, whole or not at all."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        if os.write(fd, data) != len(data):
            os.ftruncate(fd, size)
            raise OSError(errno.ENOSPC, "short write", str(path))
    finally:
        os.close(fd)


def is_real_dir(path: Path) -> bool:
    """Whether ``path`` itself, not what a symbolic link points at, is a directory."""
    return path.is_dir() and not path.is_symlink()


def is_real_file(path: Path) -> bool:
    """Whether ``path`` itself, not what a symbolic link points at, is a regular file."""
    return path.is_file() and not path.is_symlink()


def remove(path: Path) -> None:
    """Delete a file, a symbolic link (never its target) or a whole directory, if it is there.

    Of a directory everything goes that can go, whatever fails on the way. What NFS keeps of open files
    (``.nfs*``) stays, and what holds it: it goes by itself when it is closed.
    """
    if not is_real_dir(path):
        path.unlink(missing_ok=True)
        return
    errors: list[BaseException] = []
    shutil.rmtree(path, onerror=lambda function, name, problem: errors.append(problem[1]))
    if errors:
        left = [entry for entry in path.rglob("*") if not is_real_dir(entry)]
        if not left or not all(entry.name.startswith(NFS_PREFIX) for entry in left):
            raise errors[0]
