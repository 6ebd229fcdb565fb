"""``fp8train launch slurm``: the script it writes, what it keeps of a run, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8train.cli import run_command
from fp8train.config.resolve import load_config
from fp8train.run_dir.claim import check_claim, claim
from tests.training.launching import write_config

ROOT = Path(__file__).parents[2]

SBATCH = """#!/usr/bin/env bash
echo "$@" >>"$STUB_LOG"
[ -z "${STUB_REFUSAL:-}" ] || { echo "$STUB_REFUSAL" >&2; exit 1; }
echo 4711
"""

HEAD = """\
#!/usr/bin/env bash
# fp8train launch slurm, run RUN
#SBATCH --job-name=first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=RUN/launch/001/%x-%j.log
#SBATCH --chdir=HERE
#SBATCH --time=12:00:00
#SBATCH --account=me
#SBATCH --partition=big
#SBATCH --constraint="h100 | h200"
export NPROC=2
export FP8TRAIN_VENV=PREFIX
set -- RUN/launch/001/config.yaml checkpoint.resume=auto

"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, and a folder to submit it from, with a stand-in of sbatch on the path."""
    path = write_config(tmp_path)
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(SBATCH)
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    monkeypatch.delenv("FP8TRAIN_VENV", raising=False)
    monkeypatch.chdir(tmp_path)
    return path


def launch(config: Path, *words: str) -> int:
    where = [f"run.dir={config.parent / 'runs'}", "run.name=first"]
    return run_command(["launch", "slurm", str(config), "--nodes=2", "--gpus-per-node=2", *words, *where])


FLAGS = ("--time=12:00:00", "--account=me", "--partition=big", "--sbatch=--constraint=h100 | h200")


def test_a_dry_run_prints_the_script_and_writes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(config, "--dry-run", *FLAGS) == 0
    run = config.parent / "runs" / "first"
    expected = HEAD.replace("RUN", str(run)).replace("HERE", str(config.parent)).replace("PREFIX", sys.prefix)
    printed = capsys.readouterr().out
    script, _, command = printed.partition("# would be written to ")
    assert script.startswith(expected)
    body = (ROOT / "launch/slurm.sbatch").read_text()
    assert script.removeprefix(expected) == body[body.index("set -euo") :]
    assert command.endswith(f"submitted with\n# sbatch --parsable {run}/launch/001/slurm.sbatch\n")
    assert not run.parent.exists()
    assert not (config.parent / "log").exists()
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.stderr == ""


def test_what_is_submitted_is_kept_and_a_job_may_begin_there(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = config.read_text()
    assert launch(config, "optimizer.lr=0.5") == 0
    folder = config.parent / "runs/first/launch/001"
    assert "submitted job 4711" in capsys.readouterr().out
    assert (config.parent / "log").read_text() == f"--parsable {folder / 'slurm.sbatch'}\n"
    # The job reads what was checked, not a file that may have changed by then.
    config.write_text("")
    assert load_config(folder / "config.yaml").config.optimizer.lr == 0.5
    config.write_text(before)
    record = json.loads((folder / "launch.json").read_text())
    assert record["job_id"] == "4711"
    assert "optimizer.lr=0.5" in record["overrides"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True, check=False)
    assert (record["git"] or {}).get("revision", "") == head.stdout.strip()
    assert (folder / "git.diff").exists()

    # A second submission has a folder of its own. The job takes the run directory, and may overwrite it.
    assert launch(config) == 0
    where = (config.parent / "runs", "first")
    assert not check_claim(*where, resume="never", overwrite=False)
    lock, continued = claim(*where, resume="auto", overwrite=False)
    assert not continued
    os.close(lock)
    lock, _ = claim(*where, resume="never", overwrite=True)
    os.close(lock)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["001", "002"]


def test_a_chain_is_an_array_that_is_not_requeued(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(config, "--dry-run", "--turns=5", "--image=i.sqsh") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "#SBATCH --array=1-5%1" in lines
    assert "#SBATCH --no-requeue" in lines
    assert "#SBATCH --requeue" not in lines
    assert {"export FP8TRAIN_CHAIN=array", "export FP8TRAIN_REQUEUES=0"} <= set(lines)
    assert "export FP8TRAIN_IMAGE=i.sqsh" in lines


def test_what_cannot_run_is_refused_before_anything_is_written(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (("parallel.tp=4",), "legal: parallel.tp=1 or 2"),
        (("train.global_batch_size=6",), "nearest legal"),
        (("data.prefix=/nowhere/text",), "/nowhere/text"),
        (("--sbatch=constraint",), "--sbatch=--name=value"),
    ):
        assert launch(config, *words) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/usr/sbin/nowhere")
    assert launch(config) == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert not (config.parent / "runs").exists()


def test_a_job_that_slurm_refuses_keeps_its_script(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUB_REFUSAL", "sbatch: error: invalid partition specified: nowhere")
    assert launch(config) == 2
    said = capsys.readouterr().err
    assert "sbatch refused the job: sbatch: error: invalid partition specified: nowhere" in said
    script = config.parent / "runs/first/launch/001/slurm.sbatch"
    assert f"submit it with: sbatch {script}" in said
    assert script.is_file()
