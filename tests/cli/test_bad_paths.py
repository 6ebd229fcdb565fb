"""A path that no file system takes is the user's to mend, whichever command asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.cli import run_command
from tests.config.examples import MINIMAL

LONG = "x" * 300
COMMANDS = [
    ["config", LONG],
    ["train", LONG],
    ["train", "CONFIG", f"data.prefix={LONG}"],
    ["train", "CONFIG", "data.prefix=CONFIG", f"checkpoint.resume={LONG}"],
    ["report", "scales", LONG],
    ["verify", LONG],
    ["data", "inspect", LONG],
    ["eval", LONG],
    ["generate", LONG, "--prompt", "a"],
    ["import", "hf", LONG, "--output", "o"],
    ["export", "hf", LONG, "--output", "o"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:20])
def test_a_name_that_is_too_long(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(MINIMAL)
    assert run_command([word.replace("CONFIG", "run.yaml") for word in command]) == 2
    text = capsys.readouterr().err
    assert 1 <= len(text.splitlines()) <= 6
    assert "error: " in text
    assert "Traceback" not in text
