"""The table of faults is whole, names tests that there are, and stands in the documentation."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults.table import ROWS, all_tests
from tools.fault_table import PAGE, known_results, result_of, table

TESTS = Path(__file__).parents[1]


def test_every_case_has_a_row() -> None:
    assert [row.number for row in ROWS] == list(range(1, 49))
    for row in ROWS:
        assert row.case and row.expected
        assert len(set(row.tests)) == len(row.tests), row.number


@pytest.mark.parametrize("file", sorted({test.partition("::")[0] for test in all_tests()}))
def test_every_test_of_a_file_is_there(file: str) -> None:
    """Read from its source: collecting all of them takes minutes."""
    defined = {
        node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    named = {test.partition("::")[2] for test in all_tests() if test.startswith(f"{file}::")}
    assert named <= defined


def test_the_page_has_the_table() -> None:
    assert table(known_results()) in PAGE.read_text(), "run tools/fault_table.py"


def test_results_are_counted() -> None:
    row = ROWS[0]
    one = {"passed": 2, "seconds": 1.4}
    results = {"tests": {row.tests[0]: one, row.tests[1]: {"failed": 1, "skipped": 3, "seconds": 2.0}}}
    assert result_of(row, results) == "2 passed, 1 failed, 3 skipped, 3 s"
    assert result_of(row, {"tests": {row.tests[0]: one}}) == "2 passed, 1 s; some not run yet"
    assert result_of(row, {}) == "not run yet"
