"""The profiled window: the trace of a real run has its steps and phases, and nothing of other steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fp8train.cli import run_command
from fp8train.config.errors import ConfigError
from fp8train.config.world import check_world
from tests.training.launching import write_config
from tests.training.tiny import tiny_config


def test_the_trace_of_a_window_has_its_steps_by_phase(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command = ["train", str(config), f"run.dir={tmp_path}", "run.name=a", "run.device=cpu", "train.steps=6"]
    command += ["train.eval_interval=4", "train.eval_batches=1", "checkpoint.interval=4"]
    assert run_command([*command, "profile.start=3", "profile.stop=4", "profile.memory=true"]) == 0
    (path,) = (tmp_path / "a" / "profile").iterdir()
    assert path.name == "rank0_steps3-4.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("cat") == "user_annotation"]
    steps = {span["name"]: span for span in spans if span["name"].startswith("step ")}
    assert sorted(steps) == ["step 3", "step 4"]

    def inside(name: str) -> list[str]:
        """Phases of a step, in order of time; both are in microseconds."""
        begin, end = steps[name]["ts"], steps[name]["ts"] + steps[name]["dur"]
        within = [
            span for span in spans if begin <= span["ts"] < end and not span["name"].startswith("step ")
        ]
        return [span["name"] for span in sorted(within, key=lambda span: span["ts"])]

    passes = ["forward", "backward"] * 4  # micro-batches
    through = ["data", *passes, "reduce", "optimizer", "report"]
    known = [*through, "agree", "evaluate", "save"]
    assert [phase for phase in inside("step 3") if phase in known] == [*through, "agree"]
    assert [phase for phase in inside("step 4") if phase in known] == [*through, "evaluate", "agree", "save"]
    # What is computed lies in the phase that computes it.
    backward = next(span for span in spans if span["name"] == "backward")
    inner = {
        event["name"]
        for event in events
        if event.get("cat") == "cpu_op" and backward["ts"] <= event["ts"] <= backward["ts"] + backward["dur"]
    }
    assert any("Backward" in name for name in inner)
    assert any(event.get("name") == "[memory]" for event in events)
    records = [json.loads(line) for line in (tmp_path / "a/events.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "profile"] == [4]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["profile.start=3"], "profile.stop does not end"),
        (["profile.start=3", "profile.stop=2"], r"profile.stop \(2\) is before profile.start \(3\)"),
        (["profile.stop=2"], "profile.start"),
        (["profile.start=21", "profile.stop=22"], r"after the last step \(20\)"),
        (["profile.start=1", "profile.stop=2", "profile.ranks=[0,0]"], "names a rank twice"),
    ],
)
def test_a_window_that_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_config(overrides)


def test_a_rank_that_is_not_there_is_refused() -> None:
    config = tiny_config(["profile.start=1", "profile.stop=2", "profile.ranks=[0,4]"])
    with pytest.raises(ConfigError, match=r"names rank 4, but ranks are 0 to 3"):
        check_world(config, 4)
    assert check_world(config, 8) == (8, 1)
