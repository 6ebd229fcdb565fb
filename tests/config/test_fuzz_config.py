"""The tool that trains random configurations: what it draws, and that it tells a late refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.config.resolve import load_config
from tools.fuzz_config import Case, accepted, make_case, run_case, write_files

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_drawn_is_accepted_and_the_same_every_time(tmp_path: Path) -> None:
    config = write_files(tmp_path)
    plain = load_config(config).config
    cases = [make_case(number, 5, config, 0.5, 6) for number in range(6)]
    assert cases == [make_case(number, 5, config, 0.5, 6) for number in range(6)]
    assert {case.ranks for case in cases} == {1, 2}
    assert len({tuple(case.overrides) for case in cases}) == 6
    for case in cases:
        resolved = accepted(config, case)
        assert resolved is not None
        assert resolved.config != plain
        for key, value in case.settings.items():
            assert str(resolved.origins[key]) == "command line" or isinstance(value, dict), key


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({"precision.level": "O1"}, "ran"),
        ({"data.kind": "sft"}, "late"),  # this data has no answers
        ({"train.micro_batch_size": 3}, "refused"),
        ({"logging.interval": -1}, "refused"),
    ],
)
def test_what_becomes_of_a_case(tmp_path: Path, settings: dict[str, object], outcome: str) -> None:
    verdict = run_case(None, 0, 1, write_files(tmp_path), Case(0, settings, 1))
    assert verdict.outcome == outcome, verdict.text
