"""``OMP_NUM_THREADS``: honoured where ``run.threads`` does not say, and shown as where the number is from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8train.comm.processes import choose_threads
from fp8train.config.errors import ConfigError
from fp8train.config.explain import explain
from fp8train.config.resolve import resolve_mapping
from fp8train.config.threads import threads_from_environment
from tests.config.examples import MINIMAL, minimal, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "threads"), [("3", 3), (" 12 ", 12), ("4,2", 4), ("", None), ("  ", None), (None, None)]
)
def test_what_the_variable_says(text: str | None, threads: int | None) -> None:
    assert threads_from_environment({} if text is None else {"OMP_NUM_THREADS": text}) == threads


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "9" * 30, ",3", "٣"])
def test_what_is_no_number_of_threads(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^OMP_NUM_THREADS=.* unset it, or write run\.threads=1"):
        threads_from_environment({"OMP_NUM_THREADS": text})


def test_the_setting_wins_then_the_variable_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert choose_threads(3, 2) == 3
    assert choose_threads(None, 2) == 7
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    assert choose_threads(None, 1) == cores
    assert choose_threads(None, 10 * cores) == 1


def threads_line(*overrides: str, **environment: str) -> list[str]:
    table = explain(resolve_mapping(minimal(), overrides), environment)
    return next(line.split(maxsplit=2)[1:] for line in table.splitlines() if line.startswith("run.threads "))


def test_the_resolved_config_says_where_threads_are_from() -> None:
    assert threads_line() == ["null", "default"]
    assert threads_line(OMP_NUM_THREADS="5") == ["5", "environment OMP_NUM_THREADS"]
    assert threads_line("run.threads=2", OMP_NUM_THREADS="5") == ["2", "command line"]
    assert threads_line("run.threads=2", OMP_NUM_THREADS="many") == ["2", "command line"]


def test_a_wrong_variable_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    code = (
        "import sys; from fp8train.cli import run_command\n"
        f"status = run_command(['train', {str(path)!r}])\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "all"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: OMP_NUM_THREADS='all' is not a number of threads")
