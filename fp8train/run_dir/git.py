"""Which code a run was started with: what git says of a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit hash, and whether tracked files differ from it; None outside a repository."""
    revision, changes = (
        _git(directory, *arguments)
        for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    if revision is None or changes is None:
        return None
    return {"revision": revision.strip(), "dirty": bool(changes.strip())}


def git_diff(directory: Path) -> str:
    """How tracked files of the whole repository differ from the commit, as a patch that ``git apply`` takes;
    empty outside a repository."""
    return _git(directory, "diff", "--binary", "HEAD") or ""


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
