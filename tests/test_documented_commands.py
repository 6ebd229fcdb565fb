"""The commands that the quick start's page and README.md show, run as they stand there.

A tiny quick start (tools/quickstart.py with overrides) makes the runs that they name. Commands are read from
the fenced ``bash`` blocks, so one that is changed in a page is tested as changed. What stands for something
of the reader's own (a corpus, a large model's run) has a small stand-in of the same name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fp8train.cli import run_command
from tests.test_docs import ROOT

pytestmark = pytest.mark.timeout(900)  # the first test waits for the quick start

TINY = (
    *("model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.num_kv_heads=2"),
    *("train.steps=24", "train.eval_interval=8", "train.eval_batches=4", "logging.interval=4"),
    "logging.cast_statistics_interval=12",
)
SMALLER = {"--vocab-size 32000": "--vocab-size 320"}
"""What would not fit the stand-ins."""
OTHER_PROGRAMS = ("launch/", "NPROC=", "source ", ".venv/bin/", "touch ", "tensorboard ", "git ")
"""Starts of lines that are not ``fp8train`` commands: set-up, and launchers that have tests of their own."""


def commands(page: str) -> list[str]:
    """Lines of a page's ``bash`` blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [text for text in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if text]


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a folder to work in, what a tiny quick start printed); its runs and data lie there by their names."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(ROOT / "tools/quickstart.py"), "--vocab-size", "512"]
    command += ["--out", str(folder / "runs/quickstart"), "--data", str(folder / "data/quickstart"), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert "FAIL" in done.stdout, done.stdout + done.stderr  # 24 steps do not reach the limits
    assert done.returncode == 1
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder, done.stdout


@pytest.fixture
def here(quick_start: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the quick start as the current one, as the checkout is for a reader."""
    monkeypatch.chdir(quick_start[0])
    threads = torch.get_num_threads()
    yield quick_start[0]
    torch.set_num_threads(threads)


def run(command: str) -> None:
    """An ``fp8train`` command in this process."""
    for text, smaller in SMALLER.items():
        command = command.replace(text, smaller)
    program, *arguments = shlex.split(command)
    assert program == "fp8train", f"{command}: give this line to OTHER_PROGRAMS, or a stand-in"
    assert run_command(arguments) == 0, command


def test_the_quick_start_says_what_it_did(quick_start: tuple[Path, str]) -> None:
    folder, output = quick_start
    assert len(output.splitlines()) <= 70
    rows = {
        name.strip(): [cell.strip() for cell in cells.split("│")]
        for name, cells in re.findall(r"^│([^│]+)│(.+)│$", output, re.MULTILINE)
    }
    assert set(rows) == {"bigram", "BF16", "FP8 GEMMs", "O1", "O2"}
    for name, linears in {"BF16": "0 of 4", "FP8 GEMMs": "4 of 4", "O1": "4 of 4", "O2": "4 of 4"}.items():
        assert rows[name][3] == linears
    assert rows["BF16"][4:6] == ["16.00 + 2.00", "4.00"]
    # One FP32 scale for each run of up to 128 elements: of 32 and 256 columns here.
    assert 6.0 < float(rows["O2"][4].partition(" +")[0]) < 6.2
    assert 1.0 < float(rows["O2"][5]) < 1.2
    for name in ("trained", "quality", "memory", "network", "in FP8", "time"):
        assert re.search(rf"^{name} +\S", output, re.MULTILINE), name
    assert re.findall(r"^(ok|FAIL) +(.+?)(?: \([-+\d.]+\))?$", output, re.MULTILINE)[2:] == [
        ("ok", "FP8 at most 0.05 nats above BF16"),
        ("ok", "every hidden linear ran in FP8"),
    ]
    assert (folder / "runs/quickstart/loss.png").stat().st_size > 10_000
    logged = (folder / "runs/quickstart/llama_o2/logs/console.log").read_text()
    assert "step 24/24 | loss" in logged


def test_commands_of_the_quick_starts_page(here: Path) -> None:
    ran = [line for line in commands("docs/quickstart.md") if not line.startswith(OTHER_PROGRAMS)]
    for line in ran:
        run(line)
    # The page leads to each of these.
    for word in ("eval", "generate", "verify", "report scales", "config", "train", "export states"):
        assert any(line.startswith(f"fp8train {word}") for line in ran), word
    assert list((here / "runs/quickstart/llama_o2/report").glob("*.png"))


def test_commands_of_the_readme(here: Path) -> None:
    stand_ins(here)
    ran = [line for line in commands("README.md") if line.startswith("fp8train ")]
    for line in ran:
        run(line)
    assert len(ran) >= 6


def stand_ins(folder: Path) -> None:
    """Of what README.md takes as given: a corpus, conversations, a tokenizer, a task, a trained Llama."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(8):
        lines = [f"Page {i} of the book says {i * j} words about folding paper." for j in range(300)]
        (corpus / f"{i}.txt").write_text("\n".join(lines))
    chats = [{"prompt": f"What is {i} + 1?\n", "response": str(i + 1)} for i in range(50)]
    (folder / "chats.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    task = {"query": "def f(x): return", "choices": ["x", "()"], "gold": 0}
    (folder / "piqa.jsonl").write_text(f"{json.dumps(task)}\n" * 3)
    os.symlink(folder / "data/quickstart/stdlib.model", folder / "TOKENIZER")
    os.symlink(folder / "runs/quickstart/llama_o2", folder / "runs/llama3_8b")
