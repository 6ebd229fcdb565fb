"""Metric records: strict JSON, nothing lost."""

import json
import math
from pathlib import Path

import pytest

from fp8train.run_dir.metrics import metrics_record, read_metrics


def refuse(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_records_are_strict_json_and_come_back(tmp_path: Path) -> None:
    metrics = {"train/loss": math.nan, "optim/grad_norm": math.inf, "eval/loss": -math.inf, "comm/bytes": 12}
    text = json.dumps(metrics_record(3, 4096, metrics), allow_nan=False)
    plain = json.loads(text, parse_constant=refuse)
    assert plain == {
        "step": 3,
        "tokens": 4096,
        "train/loss": "nan",
        "optim/grad_norm": "inf",
        "eval/loss": "-inf",
        "comm/bytes": 12,
    }
    path = tmp_path / "metrics.jsonl"
    path.write_text(text + "\n" + text[:20])  # the last line was torn by a kill
    (record,) = read_metrics(path)
    assert math.isnan(record.pop("train/loss"))
    assert record == {
        "step": 3,
        "tokens": 4096,
        "optim/grad_norm": math.inf,
        "eval/loss": -math.inf,
        "comm/bytes": 12,
    }


@pytest.mark.parametrize("name", ["loss", "train/", "lr/optim", "/loss"])
def test_names_have_a_known_section(name: str) -> None:
    with pytest.raises(AssertionError, match="section/name"):
        metrics_record(1, 1, {name: 1.0})
