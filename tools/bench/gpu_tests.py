"""Run the tests that need a GPU, and write what became of each.

    python tools/bench/gpu_tests.py --json out.json

``CUBLAS_WORKSPACE_CONFIG``, which deterministic cuBLAS needs, is read once: it is set before all else.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from measure import Results

TESTS = Path(__file__).parents[2] / "tests"


class Recorder:
    """A plugin of pytest: one row a test."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's outcome, and that of a fixture if it did not pass."""
        if report.when != "call" and report.passed:
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        self._results.add(**row)
        if report.failed:
            self._results.fail(f"{report.nodeid}: {report.longreprtext[-500:]}")


def main() -> int:
    """Run, and return 1 if a test failed, or if none ran although there is a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: all are skipped"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    results = Results(args.json, torch.device("cuda" if on_gpu else "cpu"))
    if args.device == "cuda" and not on_gpu:
        results.fail("torch finds no GPU")
        return results.finish()
    files = [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    status = pytest.main([*options, *files], plugins=[Recorder(results)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        results.fail(f"pytest ended with {status!r}")
    passed = sum(row["outcome"] == "passed" for row in results.rows)
    if on_gpu and not passed:
        results.fail("no test passed")
    return results.finish(passed=passed)


if __name__ == "__main__":
    sys.exit(main())
