"""Records and small JSON files that were damaged: one line is lost, with a word, or one error is raised."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fp8train import json_text
from fp8train.comm.failures import Failure, recorded
from fp8train.json_text import parse_object, read_object, records
from fp8train.reporting.cast_log import read_cast_log, read_samples
from fp8train.reporting.errors import ReportError
from fp8train.run_dir.claim import recorded_step
from fp8train.run_dir.directory import RunDir
from fp8train.run_dir.failed import amend_failure, read_failure
from fp8train.run_dir.metrics import read_metrics
from tests.hostile_json import HOSTILE

GOOD = [{"step": step, "site": "layers.0.mlp.up/x", "log2_scale": 1.5} for step in (1, 2, 3)]
LINES = [json.dumps(record).encode() + b"\n" for record in GOOD]
DAMAGED = [line for line in HOSTILE.values() if line] + [
    b'{"step": 2, "site": "layers.0.mlp.up/x", "amax": [1]}'
]
DAMAGED.append(b'{"step": 2, "site": "layers.0.mlp.up/x", "log2_scale": -1e308}')


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_is_read_or_refused_with_one_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(HOSTILE[name])
    (tmp_path / "rank0.json").write_bytes(HOSTILE[name])
    assert recorded_step(tmp_path) == 0
    assert read_failure(tmp_path) is None
    assert recorded(tmp_path) == []
    amend_failure(tmp_path, Failure(0, "it broke"))
    assert (tmp_path / "status.json").read_bytes() == HOSTILE[name]
    with pytest.raises(ReportError, match=r"status\.json is damaged: ") as error:
        read_cast_log(tmp_path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ('{"a": {"b": NaN}}', "NaN, which JSON does not have"),
        ('{"a": -Infinity}', "-Infinity, which JSON does not have"),
        ("[]", "not a JSON object"),
        ('{"a": 1}x', "not JSON: Extra data"),
    ],
)
def test_strict_json_says_what_is_wrong(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_object(tmp_path / "a.json")


def test_a_mark_at_the_start_is_no_fault() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(1 << 40)  # no disk holds it: only its size is there
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_object(tmp_path / "a.json")


def test_damaged_lines_cost_themselves_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a log with every kind of damaged line, the good lines are kept, and the others counted."""
    monkeypatch.setattr(json_text, "MAX_LINE", 1 << 20)
    long = b'{"step": 2, "x": "' + b"x" * (3 << 20) + b'"}'
    path = tmp_path / "casts.jsonl"
    rest = b"\n".join([*DAMAGED, long]) + b"\n"
    path.write_bytes(LINES[0] + rest + LINES[1] + LINES[2] + LINES[2][:9])
    assert [line for line, record in records(path) if record is not None and record in GOOD] == LINES
    assert max(len(line) for line, _ in records(path)) < 1 << 20
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "train/loss": "nan"}\n' + rest)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["step"] == 1

    notes: list[str] = []
    samples = read_samples(path, notes)
    assert [(sample.step, sample.values) for sample in samples] == [
        (step, {"log2_scale": 1.5}) for step in (1, 2, 3)
    ]
    assert notes == [f"casts.jsonl: {len(DAMAGED) + 2} unreadable lines left out"]  # the torn end too

    run = RunDir.open(tmp_path.parent, tmp_path.name + "_run", resume="never", overwrite=False, group=None)
    path.rename(run.path / "casts.jsonl")
    with caplog.at_level(logging.WARNING):
        run.truncate_after(2)
    run.close()
    kept = (run.path / "casts.jsonl").read_bytes()
    assert kept.startswith(LINES[0])
    assert kept.endswith(LINES[1])
    assert LINES[2] not in kept
    assert long not in kept
    (warning,) = caplog.messages
    assert "casts.jsonl: " in warning
    assert "unreadable line(s) left out" in warning


def test_a_tail_of_nul_bytes_after_a_power_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir.open(tmp_path, "r", resume="never", overwrite=False, group=None)
    run.log_metrics({"step": 1})
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.truncate(50 << 20)
    run.truncate_after(1)
    run.close()
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
