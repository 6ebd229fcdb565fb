"""The command line as a person or a launcher meets it: statuses, messages, nothing imported in vain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fp8train.cli import run_command
from fp8train.config.errors import UserError
from tests.config.examples import MINIMAL, write

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def good(tmp_path: Path) -> str:
    return str(write(tmp_path, MINIMAL))


@pytest.fixture
def bad(tmp_path: Path) -> str:
    return str(write(tmp_path, MINIMAL.replace("lr: 3e-4", "lerning_rate: 3e-4"), "bad.yaml"))


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fp8train`` as its own process."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "RANK"))
    }
    return subprocess.run(
        [sys.executable, "-m", "fp8train", *words],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def with_run(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Let ``fp8train train`` call ``run`` with the resolved config instead of training."""
    checked = SimpleNamespace(preflight=lambda resolved, world: resolved)
    started = SimpleNamespace(run=lambda config, world, data, **given: run(data, **given))
    monkeypatch.setitem(sys.modules, "fp8train.training.preflight", checked)
    monkeypatch.setitem(sys.modules, "fp8train.training.run", started)


def test_config_prints_values_and_does_not_import_torch(good: str) -> None:
    code = (
        "import sys; from fp8train.cli import run_command\n"
        f"status = run_command(['config', {good!r}, 'run.seed=5'])\n"
        "heavy = {'torch', 'numpy', 'sentencepiece', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert any(line.split() == ["run.seed", "5", "command", "line"] for line in done.stdout.splitlines())
    assert f"{good}:10" in done.stdout


def test_a_typo_is_reported_before_torch_is_imported(bad: str) -> None:
    code = (
        "import sys; from fp8train.cli import run_command\n"
        f"status = run_command(['train', {bad!r}])\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"{bad}:10: optimizer.lerning_rate: unknown key; did you mean optimizer.lr?" in done.stderr


EARLY = {
    "eval of nothing": (["eval", "{tmp}/nothing"], "error: {tmp}/nothing: no such directory; give a run "),
    "eval of a file": (["eval", "{tmp}/file"], "error: {tmp}/file: not a directory; give a run "),
    "eval without checkpoints": (["eval", "{tmp}"], "error: {tmp} holds no checkpoint; give a run "),
    "eval of no text": (
        ["eval", "{run}", "--text", "{tmp}/nothing"],
        "error: --text {tmp}/nothing: no such file; give a file of text",
    ),
    "eval of no task": (["eval", "{run}", "--tasks", "{tmp}"], "error: --tasks {tmp}: not a file; give"),
    "eval of no dataset": (
        ["eval", "{run}", "--prefix", "{tmp}/x"],
        "error: dataset {tmp}/x: missing: x.bin",
    ),
    "eval to nowhere": (["eval", "{run}", "--json", "{tmp}/no/x"], "error: --json {tmp}/no/x: its folder "),
    "eval in a format": (["eval", "{run}", "--numerics", "fp4"], "error: Invalid value for '--numerics': "),
    "eval of both": (
        ["eval", "{run}", "--text", "{tmp}/file", "--tasks", "{tmp}/file"],
        "error: --text and --tasks are evaluated one at a time",
    ),
    "verify": (["verify", "{tmp}/nothing"], "error: {tmp}/nothing: no such directory; give a run "),
    "generate": (["generate", "{tmp}/nothing"], "error: {tmp}/nothing: no such directory; give a run "),
    "export": (["export", "hf", "{tmp}", "--output", "x"], "error: {tmp} holds no checkpoint; give a run "),
    "import": (
        ["import", "hf", "{tmp}", "--output", "x"],
        "error: {tmp}/config.json: No such file or directory; give the folder of a model",
    ),
}


def test_wrong_arguments_are_reported_before_torch_is_imported(tmp_path: Path) -> None:
    """Importing torch takes seconds; one process answers them all without it."""
    (tmp_path / "file").write_text("x")
    run = tmp_path / "some" / "run"
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    cases = [[word.format(tmp=tmp_path, run=run) for word in words] for words, _ in EARLY.values()]
    code = (
        "import sys; from fp8train.cli import run_command\n"
        f"for words in {cases!r}:\n"
        "    print(run_command(words), 'torch' in sys.modules, flush=True)\n"
        "    print('---', file=sys.stderr, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["2 False"] * len(EARLY)
    answers = done.stderr.split("---\n")
    for (_, expected), answer in zip(EARLY.values(), answers, strict=False):
        assert answer.startswith(expected.format(tmp=tmp_path, run=run)), answer
        assert 1 <= len(answer.splitlines()) <= 5


@pytest.mark.parametrize("environment", [{}, {"TORCHELASTIC_RUN_ID": "1"}], ids=["alone", "torchrun"])
def test_the_start_is_announced_before_torch_is_imported(good: str, environment: dict[str, str]) -> None:
    code = (
        "import sys; from types import SimpleNamespace\n"
        "def run(*things, **given): print('torch is here' if 'torch' in sys.modules else 'no torch yet')\n"
        "sys.modules['fp8train.training.run'] = SimpleNamespace(run=run)\n"
        "checked = SimpleNamespace(preflight=lambda *things, **more: None)\n"
        "sys.modules['fp8train.training.preflight'] = checked\n"
        f"sys.argv = ['fp8train', 'train', {good!r}, 'train.steps=3', 'run.name=here']\n"
        "from fp8train.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    started = f"starting {good}: llama at O0, 3 steps, 1 process; run runs/here"
    assert done.stdout.splitlines() == [started, "no torch yet"]
    assert (done.returncode, done.stderr) == (0, "")


def test_user_error_is_one_message_and_status_2(bad: str) -> None:
    done = command("config", bad)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {bad}:10: optimizer.lerning_rate: unknown key; did you mean optimizer.lr?\n"
    )


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_is_written(place: int, bad: str) -> None:
    words = ["config", bad]
    words.insert(place, "--debug")
    done = command(*words)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_only_rank_0_prints_and_every_rank_fails(bad: str, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        error_file = tmp_path / f"error{rank}.json"
        done = command("config", bad, RANK=rank, TORCHELASTIC_ERROR_FILE=str(error_file))
        assert done.returncode == 2
        assert (done.stderr == "") == (rank == "1")
        recorded = json.loads(error_file.read_text())["message"]
        assert "optimizer.lerning_rate" in recorded["message"]
        assert int(recorded["extraInfo"]["timestamp"]) > 0


def test_train_passes_the_resolved_config_and_returns_the_status(
    good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(resolved: Any, **given: Any) -> int:
        seen.append((resolved, given))
        return 17

    with_run(monkeypatch, run)
    assert run_command(["train", good, "optimizer.lr=1e-2", "train.steps=3"]) == 17
    [(resolved, given)] = seen
    assert resolved.config.optimizer.lr == 1e-2
    assert str(resolved.origins["train.steps"]) == "command line"
    assert given["again"].endswith("optimizer.lr=1e-2 train.steps=3 checkpoint.resume=auto")


def test_statuses_of_what_training_raises(
    good: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class TooSmallError(UserError):
        exit_status = 9

    def user_error(resolved: Any, **given: Any) -> int:
        raise TooSmallError("the dataset is too small")

    def interrupted(resolved: Any, **given: Any) -> int:
        raise KeyboardInterrupt

    def bug(resolved: Any, **given: Any) -> int:
        raise ZeroDivisionError("ours")

    with_run(monkeypatch, user_error)
    assert run_command(["train", good]) == 9
    assert capsys.readouterr().err == "error: the dataset is too small\n"
    with_run(monkeypatch, interrupted)
    assert run_command(["train", good]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with_run(monkeypatch, bug)
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_command(["train", good])


def test_ctrl_c_exits_130() -> None:
    code = (
        "import sys, time; from types import SimpleNamespace\n"
        "def doctor():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(30)\n"
        "sys.modules['fp8train.cli.doctor'] = SimpleNamespace(doctor=doctor)\n"
        "sys.argv = ['fp8train', 'doctor']\n"
        "from fp8train.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests started in the background of a shell inherit an ignored SIGINT; a person's terminal has none.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_closed_pipe_is_quiet(good: str) -> None:
    script = f'"{sys.executable}" -m fp8train config --schema | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "1")


USAGE = {
    "unknown command": (["traiin"], "error: No such command 'traiin'"),
    "unknown option": (["config", "x.yaml", "--bogus"], "error: No such option: --bogus"),
    "missing config": (["train"], "error: Missing argument 'config'"),
    "config of nothing": (["config"], "error: name a config file, or ask for --schema or --reference"),
    "schema of a file": (
        ["config", "x.yaml", "--schema"],
        "error: --schema and --reference describe every config",
    ),
    "two outputs": (
        ["config", "--schema", "--yaml"],
        "error: --yaml, --schema, --reference, --recipe and --summary exclude each other",
    ),
    "no text": (["data", "prepare", "--output", "x"], "error: name text files or folders, or give --stdlib"),
    "no output": (["data", "prepare", "x"], "error: Missing option '--output'"),
    "bad choice": (["generate", "x", "--device", "tpu"], "error: Invalid value for '--device': "),
    "bad number": (["generate", "x", "--top-p", "2"], "error: Invalid value for '--top-p': "),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_status_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = USAGE[name]
    assert run_command(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(expected)
    assert len(err.splitlines()) <= 5


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    from fp8train import __version__

    assert run_command([]) == 0
    listing = capsys.readouterr().out
    for name in ("train", "config", "data", "generate", "doctor"):
        assert f"\n  {name} " in listing
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"fp8train {__version__}\n"


def test_config_outputs(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", good, "--yaml"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert run_command(["config", str(again), "--yaml"]) == 0
    assert capsys.readouterr().out == again.read_text()
    assert run_command(["config", "--schema"]) == 0
    assert "base" in json.loads(capsys.readouterr().out)["properties"]
    assert run_command(["config", "--reference"]) == 0
    assert "| `train.steps` |" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "file"), [("--reference", "reference.md"), ("--schema", "schema.json")])
def test_the_committed_reference_is_what_the_command_prints(
    option: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["config", option]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "docs" / file).read_text(encoding="utf-8") == printed, (
        f"write it again: fp8train config {option} > docs/{file}"
    )


def test_data_prepare_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.md").write_text("".join(f"line {i} of text {number}\n" for i in range(300)))
    prefix = str(tmp_path / "out" / "corpus")
    words = ["data", "prepare", str(folder), "--output", prefix, "--glob", "*.md", "--vocab-size", "280"]
    assert run_command([*words, "--train-tokenizer", "bpe", "--workers", "1"]) == 0
    assert "3 documents" in capsys.readouterr().out
    assert Path(f"{prefix}.bin").exists()
    assert Path(f"{prefix}.idx").exists()
    assert run_command(["data", "inspect", prefix, "--documents", "1", "--scan"]) == 0
    shown = capsys.readouterr().out
    assert "3 documents" in shown
    assert "line 0 of text" in shown
    assert run_command(words) == 2  # exists already
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_names_the_reason(bad: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", sys.executable,
         "-m", "fp8train", "train", bad],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1  # by the rank that was first
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "exitcode  : 2" in summary
    assert "optimizer.lerning_rate" in summary
    assert 'File "' not in done.stderr.split("ChildFailedError")[1]
