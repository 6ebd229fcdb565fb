"""A copy of the package in a temporary folder, for tests that add a file to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_package(folder: Path, *others: str) -> None:
    """Put the package, and ``others`` (files and folders relative to the repository), into ``folder``."""
    clean = shutil.ignore_patterns("__pycache__")
    for name in ("fp8train", *others):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=clean)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder`` with the copy as the package."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
