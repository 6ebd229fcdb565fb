"""Launch scripts: what they pass on, what they refuse, and that a signal ends a run with status 0."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "tools" / "lint.sh"]

# Stands in for Python as torchrun: prints its arguments, starts a child that stops when told, as workers do.
TORCHRUN = """#!/usr/bin/env bash
echo "$@"
echo "threads $OMP_NUM_THREADS"
[ -n "${STUB_WORKER:-}" ] || exit 3
trap 'echo torchrun was hit; exit 1' INT TERM
set -m  # or the child would ignore SIGINT
bash -c 'trap "echo worker got INT; exit 0" INT; trap "echo worker got TERM; exit 0" TERM
    echo ready; while :; do sleep 0.05; done' &
wait
"""


def call(
    script: str, *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / script), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def fake_venv(tmp_path: Path) -> str:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(TORCHRUN)
    python.chmod(0o755)
    return str(tmp_path / "venv")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_explains_itself(script: Path) -> None:
    result = call(str(script.relative_to(ROOT)), "-h")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert script.name in result.stdout


def test_torchrun_arguments(fake_venv: str, tmp_path: Path) -> None:
    result = call(
        "launch/torchrun.sh", "c.yaml", "optimizer.lr=1e-3", "a.b=x y", cwd=tmp_path, FP8TRAIN_VENV=fake_venv,
        NPROC="3", OMP_NUM_THREADS="5",
    )  # fmt: skip
    assert result.returncode == 3  # the status is torchrun's
    assert result.stdout.splitlines() == [
        "-m torch.distributed.run --standalone --nproc-per-node=3 -m fp8train train c.yaml "
        "checkpoint.resume=auto optimizer.lr=1e-3 a.b=x y",
        "threads 5",
    ]


def test_torchrun_keeps_a_given_resume(fake_venv: str) -> None:
    result = call(
        "launch/torchrun.sh", "c.yaml", "checkpoint.resume=never", FP8TRAIN_VENV=fake_venv, NPROC="1"
    )
    assert result.stdout.splitlines()[0].endswith("train c.yaml checkpoint.resume=never")


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_reaches_the_workers_and_not_torchrun(fake_venv: str, name: str) -> None:
    number = getattr(signal, f"SIG{name}")
    process = subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), "c.yaml"],
        env={**os.environ, "FP8TRAIN_VENV": fake_venv, "NPROC": "1", "STUB_WORKER": "1"},
        stdout=subprocess.PIPE,
        text=True,
        # bash cannot trap what was ignored when it started, as SIGINT is in background jobs
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines = []
    while "ready\n" not in lines:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert output == f"worker got {name}\n"
    assert process.returncode == 0


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_a_wrong_number_of_processes_is_refused(fake_venv: str, value: str) -> None:
    result = call("launch/torchrun.sh", "c.yaml", FP8TRAIN_VENV=fake_venv, NPROC=value)
    assert result.returncode == 2
    assert f"NPROC must be a positive number, not '{value}'" in result.stderr


def test_set_up_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    venv = str(tmp_path / "venv")
    for arguments, environment, said in (
        (["gpu"], {}, "unknown extra 'gpu'"),
        ([], {"PYTHON": "no-such-python"}, "no 'no-such-python' found"),
        ([], {"PYTHON": str(old)}, "Python 3.8.1 is too old; fp8train needs Python 3.11 or newer"),
    ):
        result = call("launch/setup.sh", *arguments, FP8TRAIN_VENV=venv, **environment)
        assert result.returncode == 2
        assert said in result.stderr
    assert not (tmp_path / "venv").exists()
