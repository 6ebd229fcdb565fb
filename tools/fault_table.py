"""Write the table of faults and their tests (tests/faults/table.py) into docs/failures.md.

    python tools/fault_table.py          # the table, with the results of the last run of all tests
    python tools/fault_table.py --run    # run them all first: 15 minutes on two cores, slow ones included
    python tools/fault_table.py --again  # run again what failed in that run

``--run`` notes for each row how many tests passed, failed and were skipped, and in how many seconds, in
``tools/bench/results/faults_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tests.faults.table import ROWS, Row, all_tests  # noqa: E402

PAGE = ROOT / "docs/failures.md"
RESULTS = ROOT / "tools/bench/results/faults_cpu.json"
BEGIN, END = "<!-- begin: tools/fault_table.py -->", "<!-- end: tools/fault_table.py -->"

Result = Mapping[str, Any]


def run_tests(names: Sequence[str]) -> dict[str, Any]:
    """Run these files or tests; outcomes and seconds by test, over its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "faults", f"--junit-xml={report}", *names]
        subprocess.run([*command, "--timeout=1200"], cwd=ROOT, check=False)
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.get("classname", "").removeprefix("tests.").replace(".", "/")
            one = found[f"{file}.py::{case.get('name', '').partition('[')[0]}"]
            kinds = {child.tag for child in case}
            outcome = (
                "skipped" if "skipped" in kinds else "failed" if kinds & {"failure", "error"} else "passed"
            )
            one[outcome] += 1
            one["seconds"] += float(case.get("time", 0))
    return {
        test: {key: round(value, 1) if key == "seconds" else int(value) for key, value in one.items()}
        for test, one in sorted(found.items())
    }


def run_all() -> dict[str, Any]:
    """Run every test of the table, and say on what machine."""
    tests = run_tests(sorted({f"tests/{test.partition('::')[0]}" for test in all_tests()}))
    return {"machine": platform.platform(), "python": platform.python_version(), "tests": tests}


def run_again(results: dict[str, Any]) -> dict[str, Any]:
    """Run again what failed, in place of what was known of it."""
    failed = [f"tests/{test}" for test in failures(results)]
    return results | {"tests": results["tests"] | (run_tests(failed) if failed else {})}


def failures(results: Result) -> list[str]:
    """Tests that failed with any of their parameters."""
    return [test for test, one in results.get("tests", {}).items() if one.get("failed")]


def result_of(row: Row, results: Result) -> str:
    """What became of a row's tests, in words."""
    known = [results["tests"][test] for test in row.tests if test in results.get("tests", {})]
    if not known:
        return "not run yet" if row.tests else "no test"
    counts = [
        f"{count} {outcome}"
        for outcome in ("passed", "failed", "skipped")
        if (count := sum(one.get(outcome, 0) for one in known))
    ]
    missing = "" if len(known) == len(row.tests) else "; some not run yet"
    return f"{', '.join(counts)}, {sum(one['seconds'] for one in known):.0f} s{missing}"


def table(results: Result) -> str:
    """The rows in Markdown."""
    lines = ["| | case | what comes of it | tests, in `tests/` | result |", "|---|---|---|---|---|"]
    for row in ROWS:
        tests = "<br>".join(f"`{test}`" for test in row.tests) or "none"
        if row.not_here:
            tests += f"<br>{row.not_here}"
        cells = (str(row.number), row.case, row.expected, tests, result_of(row, results))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def known_results() -> dict[str, Any]:
    """Of the last run of all tests; empty before the first."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> int:
    """Write the page; the exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run all tests of the table first")
    parser.add_argument("--again", action="store_true", help="run again what failed in the last run")
    options = parser.parse_args()
    results = known_results()
    if options.run or options.again:
        results = run_all() if options.run else run_again(results)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*{re.escape(END)}", re.DOTALL)
    assert pattern.search(page), f"{PAGE} lacks the marks of the table"
    PAGE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{table(results)}\n{END}", page))
    for test in failures(results):
        print(f"failed: {test}")
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
