"""Launch scripts: what they pass on, what they refuse, and that a signal ends a run with status 0.

``slurm.sbatch`` meets stand-ins of Slurm here; tests/slurm runs it on a real one.
"""

import getpass
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "launch" / "slurm.sbatch"
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), SBATCH, ROOT / "tools" / "lint.sh"]

# Stands in for Python as torchrun: prints its arguments, starts a child that stops when told, as workers do.
TORCHRUN = """#!/usr/bin/env bash
echo "$@"
echo "threads $OMP_NUM_THREADS"
[ -n "${STUB_WORKER:-}" ] || exit 3
trap 'echo torchrun was hit; exit 1' INT TERM
set -m  # or the child would ignore SIGINT
bash -c "$STUB_WORKER" &
trap : USR1  # tells the launcher that a person ends its workers
worker=$! status=0
wait $worker || status=$?
while kill -0 $worker 2>/dev/null; do status=0; wait $worker || status=$?; done
exit $status
"""
WORKER = """for name in INT TERM HUP; do trap "echo worker got $name; exit 0" $name; done
echo ready; while :; do sleep 0.05; done
"""
# As Python until its handlers are set: a signal would end it.
LATE_WORKER = f"""echo booting; until [ -e "$STUB_LISTEN" ]; do sleep 0.05; done
{WORKER}"""
STUBBORN_WORKER = """count=0; trap "exit 9" TERM
trap 'count=$((count + 1)); echo "worker got INT $count"; [ $count -lt 2 ] || exit 130' INT
echo ready; while :; do sleep 0.05; done
"""

# Stands in for Slurm: srun notes its own arguments and runs the command as node 0, scontrol notes a requeue.
SRUN = """#!/usr/bin/env bash
own=()
while [[ "$1" == -* ]]; do own+=("$1"); shift; done
echo "srun ${own[*]}" >>"$STUB_LOG"
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
show) if [ "$2" = config ]; then echo "MaxArraySize            = 11"; else printf '%s\\n' first second; fi ;;
requeue) echo "requeue $2" >>"$STUB_LOG"; exit "${STUB_REQUEUE:-0}" ;;
esac
"""

# Stands in for Python: tells where the run lies, then trains as STUB_RUN says.
PYTHON = """#!/usr/bin/env bash
state() {
    local form='{\\n  "state": "%s",\\n  "step": %s,\\n  "exit_code": %s\\n}\\n'
    printf "$form" "$1" "${STUB_STEP:-1}" "${STUB_STATUS:-0}" >"$STUB_DIR/run/status.json"
}
if [ "$3" = --check ]; then echo "python $*" >>"$STUB_LOG"; echo "$STUB_DIR/run"; exit 0; fi
echo "python $*" >>"$STUB_LOG"
echo "threads $OMP_NUM_THREADS" >>"$STUB_LOG"
mkdir -p "$STUB_DIR/run"
state running
echo ready
case "$STUB_RUN" in
wait)
    until [ -e "$STUB_DIR/run/STOP" ]; do sleep 0.02; done
    cat "$STUB_DIR/run/STOP" >>"$STUB_LOG"
    state preempted
    ;;
late) until [ -e "$STUB_DIR/run/STOP" ]; do sleep 0.02; done; state completed ;;
die) until [ -e "$STUB_DIR/run/STOP" ]; do sleep 0.02; done; exit 7 ;;
*) state "$STUB_RUN"; exit "${STUB_STATUS:-0}" ;;
esac
"""
NOTES = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$STUB_LOG"
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
        "starting 3 processes: c.yaml optimizer.lr=1e-3 a.b=x y",
        "-m fp8train.launch --nproc-per-node=3 c.yaml checkpoint.resume=auto optimizer.lr=1e-3 a.b=x y",
        "threads 5",
    ]


def test_torchrun_shares_the_cores_that_it_may_use(fake_venv: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [str(ROOT / "launch/torchrun.sh"), "c.yaml"], capture_output=True, text=True, timeout=60,
        env={**environment, "FP8TRAIN_VENV": fake_venv, "NPROC": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "threads 1"


def test_torchrun_takes_debug_before_the_config(fake_venv: str) -> None:
    result = call("launch/torchrun.sh", "--debug", "c.yaml", "a.b=c", FP8TRAIN_VENV=fake_venv, NPROC="2")
    assert result.stdout.splitlines()[:2] == [
        "starting 2 processes: c.yaml a.b=c",
        "-m fp8train.launch --nproc-per-node=2 --debug c.yaml checkpoint.resume=auto a.b=c",
    ]


def test_torchrun_keeps_a_given_resume(fake_venv: str) -> None:
    result = call(
        "launch/torchrun.sh", "c.yaml", "checkpoint.resume=never", FP8TRAIN_VENV=fake_venv, NPROC="1"
    )
    assert result.stdout.splitlines()[0] == "starting 1 process: c.yaml checkpoint.resume=never"
    assert result.stdout.splitlines()[1].endswith(" c.yaml checkpoint.resume=never")


class Torchrun:
    """launch/torchrun.sh with a stand-in of torchrun, whose worker is a script."""

    def __init__(self, fake_venv: str, worker: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [str(ROOT / "launch" / "torchrun.sh"), "c.yaml"],
            env={**os.environ, "FP8TRAIN_VENV": fake_venv, "STUB_WORKER": worker, "NPROC": "1"} | environment,
            stdout=subprocess.PIPE,
            text=True,
            # bash cannot trap what was ignored when it started: SIGINT in background jobs, SIGHUP under nohup
            preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)],
        )

    def read_until(self, line: str) -> list[str]:
        assert self.process.stdout is not None
        lines = []
        while f"{line}\n" not in lines:
            lines.append(self.process.stdout.readline())
            assert lines[-1], lines
        return lines

    def finish(self) -> tuple[int, str]:
        """Exit status and the rest of the output."""
        try:
            output, _ = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        return self.process.returncode, output


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_reaches_the_workers_and_not_torchrun(fake_venv: str, name: str) -> None:
    job = Torchrun(fake_venv, WORKER)
    job.read_until("ready")
    job.process.send_signal(getattr(signal, f"SIG{name}"))
    assert job.finish() == (0, f"worker got {name}\n")


def test_a_signal_waits_until_the_worker_can_listen(fake_venv: str, tmp_path: Path) -> None:
    listen = tmp_path / "listen"
    job = Torchrun(fake_venv, LATE_WORKER, STUB_LISTEN=str(listen))
    job.read_until("booting")
    job.process.send_signal(signal.SIGTERM)
    job.read_until("SIGTERM: stopping before the first step")
    listen.touch()
    assert job.finish()[0] == 0


def test_a_second_ctrl_c_is_status_130(fake_venv: str) -> None:
    job = Torchrun(fake_venv, STUBBORN_WORKER)
    job.read_until("ready")
    job.process.send_signal(signal.SIGINT)
    job.read_until("worker got INT 1")
    while job.process.poll() is None:  # those of the first second count as the first
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert job.finish() == (130, "worker got INT 2\n")


def test_a_second_ctrl_c_ends_workers_that_do_not_listen_yet(fake_venv: str, tmp_path: Path) -> None:
    job = Torchrun(fake_venv, LATE_WORKER, STUB_LISTEN=str(tmp_path / "never"))
    job.read_until("booting")
    while job.process.poll() is None:
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    answer = "Ctrl-C: stopping before the first step; Ctrl-C once more: quit now\n"
    assert job.finish() == (130, answer)


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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False).stderr == b""


class FakeSlurm:
    """A job of two nodes on stand-ins of srun, scontrol and Python."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        stubs = {"srun": SRUN, "scontrol": SCONTROL, "scancel": NOTES, "../venv/bin/python": PYTHON}
        for name, text in ((f"bin/{name}", text) for name, text in stubs.items()):
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "FP8TRAIN_VENV": str(directory / "venv"),
            "STUB_DIR": str(directory),
            "STUB_LOG": str(directory / "log"),
            "STUB_RUN": "completed",
            "SLURM_JOB_ID": "40123",
            "SLURM_JOB_NODELIST": "nodes[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_ON_NODE": "24",
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return call("launch/slurm.sbatch", *arguments, cwd=self.directory, **self.environment | environment)

    def run_and_signal(self, name: str, **environment: str) -> tuple[int, str]:
        """Signal the batch script once the run is up; its exit status and output."""
        process = subprocess.Popen(
            [str(SBATCH), "c.yaml"],
            cwd=self.directory,
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        seen = []
        while "ready\n" not in seen:
            seen.append(process.stdout.readline())
            assert seen[-1], seen
        process.send_signal(getattr(signal, f"SIG{name}"))
        try:
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
        return process.returncode, output

    @property
    def log(self) -> list[str]:
        return (self.directory / "log").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    settings = {"NPROC", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
    for name in {*settings, *os.environ}:
        if name in settings or name.startswith(("SLURM_", "FP8TRAIN_")):
            monkeypatch.delenv(name, raising=False)
    return FakeSlurm(tmp_path)


def test_slurm_starts_one_torchrun_per_node(slurm: FakeSlurm) -> None:
    result = slurm.run("c.yaml", "optimizer.lr=1e-3", "a.b=x y")
    assert result.returncode == 0, result.stderr
    port = 15000 + 40123 % 17000
    assert slurm.log == [
        "srun --cpu-bind=none --nodes=1 --ntasks=1",
        "python -m fp8train.launch --check --nnodes=2 --nproc-per-node=4 "
        "c.yaml checkpoint.resume=auto optimizer.lr=1e-3 a.b=x y",
        "srun --cpu-bind=none --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1",
        "python -m fp8train.launch --node-rank=0 --nnodes=2 --nproc-per-node=4 --master-addr=first "
        f"--master-port={port} c.yaml checkpoint.resume=auto optimizer.lr=1e-3 a.b=x y",
        "threads 6",
    ]
    assert f"2 x 4 processes, rendezvous at first:{port}" in result.stdout


def test_slurm_settings_can_be_overridden(slurm: FakeSlurm) -> None:
    environment = {
        "NPROC": "3",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29999",
        "OMP_NUM_THREADS": "5",
        "SLURM_CPUS_PER_TASK": "16",
        "FP8TRAIN_SRUN_ARGS": "--label --mpi=none",
    }
    slurm.run("c.yaml", "checkpoint.resume=never", **environment)
    assert slurm.log[2].startswith("srun --cpu-bind=none --cpus-per-task=16 --label --mpi=none --nodes=2 ")
    assert slurm.log[3].endswith(
        "--nproc-per-node=3 --master-addr=10.0.0.1 --master-port=29999 c.yaml checkpoint.resume=never"
    )
    assert slurm.log[4] == "threads 5"


def test_slurm_in_a_container(slurm: FakeSlurm) -> None:
    (slurm.directory / "venv/bin/python").rename(slurm.directory / "bin/python3")
    slurm.run("c.yaml", FP8TRAIN_IMAGE="fp8train.sqsh", FP8TRAIN_MOUNTS="/data:/data:ro", FP8TRAIN_VENV="")
    mounts = f"--container-mounts={slurm.directory}:{slurm.directory},/data:/data:ro"
    container = f"--container-image=fp8train.sqsh --container-workdir={slurm.directory} {mounts}"
    assert slurm.log[0] == f"srun --cpu-bind=none {container} --nodes=1 --ntasks=1"
    assert slurm.log[2].startswith(f"srun --cpu-bind=none {container} --nodes=2 ")
    assert len(slurm.log) == 5


@pytest.mark.parametrize(
    ("name", "environment", "status", "requeued", "said"),
    [
        ("USR1", {"STUB_RUN": "wait"}, 0, True, "back into the queue"),
        ("USR1", {"STUB_RUN": "wait", "STUB_REQUEUE": "1"}, 1, True, "could not be requeued"),
        ("USR1", {"STUB_RUN": "wait", "FP8TRAIN_REQUEUES": "2", "SLURM_RESTART_COUNT": "1"}, 0, True, "turn"),
        ("USR1", {"STUB_RUN": "wait", "FP8TRAIN_REQUEUES": "0"}, 0, False, "not requeued"),
        ("USR1", {"STUB_RUN": "late"}, 0, False, "state of the run: completed"),
        ("USR1", {"STUB_RUN": "die"}, 7, False, "srun ended with status 7"),
        ("TERM", {"STUB_RUN": "wait"}, 0, False, "state of the run: preempted"),
        ("TERM", {"STUB_RUN": "wait", "FP8TRAIN_REQUEUE_ON": "any"}, 0, True, "back into the queue"),
    ],
    ids=["requeued", "refused", "another", "no-more", "was-done", "failed", "cancelled", "warned"],
)
def test_slurm_asks_the_run_to_stop_and_requeues_the_job(
    slurm: FakeSlurm, name: str, environment: dict[str, str], status: int, requeued: bool, said: str
) -> None:
    returned, output = slurm.run_and_signal(name, **environment)
    assert returned == status, output
    assert output.count(f"{name}: asking the run to save and end") == 1
    assert said in output or said == "turn"
    assert ("requeue 40123" in slurm.log) == requeued
    if environment["STUB_RUN"] == "wait":
        assert f"preempted: {'SIGTERM' if name == 'TERM' else 'Slurm time limit'}" in slurm.log
    assert not list(slurm.directory.glob("run/*STOP*"))


@pytest.mark.parametrize(
    ("state", "status"), [("stopped", 0), ("completed", 0), ("failed", 2), ("preempted", 0)]
)
def test_slurm_requeues_a_preempted_run_alone(slurm: FakeSlurm, state: str, status: int) -> None:
    """Whoever preempted it: the run may have a time limit of its own."""
    result = slurm.run("c.yaml", STUB_RUN=state, STUB_STATUS=str(status))
    assert result.returncode == status
    assert f"state of the run: {state}" in result.stdout
    assert ("requeue 40123" in slurm.log) == (state == "preempted")


def test_slurm_does_not_take_the_end_of_an_earlier_turn_for_its_own(slurm: FakeSlurm) -> None:
    (slurm.directory / "run").mkdir()
    record = '{\n  "state": "preempted",\n  "step": 1,\n  "exit_code": 0\n}\n'
    (slurm.directory / "run/status.json").write_text(record)
    (slurm.directory / "venv/bin/python").write_text(PYTHON.replace('mkdir -p "$STUB_DIR/run"', "exit 9"))
    result = slurm.run("c.yaml")
    assert result.returncode == 9
    assert "state of the run: it did not start" in result.stdout
    assert not any(line.startswith("requeue") for line in slurm.log)


@pytest.mark.parametrize(
    ("state", "step", "status", "ends"),
    [
        ("completed", 9, 0, True),
        ("stopped", 9, 0, True),
        ("preempted", 9, 0, False),
        ("failed", 9, 1, False),  # a node's fault, perhaps
        ("failed", 1, 1, True),  # at the same step as the turn before
        ("failed", 9, 3, True),
    ],
)
@pytest.mark.parametrize("mode", ["array", "singleton"])
def test_a_turn_ends_its_chain_where_another_would_not_help(
    slurm: FakeSlurm, mode: str, state: str, step: int, status: int, ends: bool
) -> None:
    (slurm.directory / "run").mkdir()
    (slurm.directory / "run/status.json").write_text('{\n  "state": "preempted",\n  "step": 1\n}\n')
    environment = {"FP8TRAIN_CHAIN": mode, "FP8TRAIN_REQUEUES": "0", "FP8TRAIN_TURN": "2"}
    environment |= {"SLURM_ARRAY_JOB_ID": "40100", "SLURM_JOB_NAME": "chain-x"}
    environment |= {"STUB_RUN": state, "STUB_STEP": str(step), "STUB_STATUS": str(status)}
    result = slurm.run("c.yaml", **environment)
    assert result.returncode == status, result.stdout + result.stderr
    which = "40100" if mode == "array" else f"--user={getpass.getuser()} --name=chain-x"
    assert (f"scancel --quiet --state=PENDING {which}" in slurm.log) == ends, slurm.log
    assert not any(line.startswith("requeue") for line in slurm.log)


def test_a_turn_that_finds_the_run_completed_starts_nothing(slurm: FakeSlurm) -> None:
    (slurm.directory / "run").mkdir()
    (slurm.directory / "run/status.json").write_text('{\n  "state": "completed",\n  "step": 1\n}\n')
    chain = {"FP8TRAIN_CHAIN": "array", "SLURM_ARRAY_JOB_ID": "40100"}
    result = slurm.run("c.yaml", **chain, SLURM_ARRAY_TASK_ID="2")
    assert result.returncode == 0
    assert "the chain ends here: the run is completed" in result.stdout
    assert len([line for line in slurm.log if line.startswith("srun")]) == 1  # the check
    # The first turn of a chain, or a job, does start: somebody may have added steps.
    slurm.run("c.yaml", **chain, SLURM_ARRAY_TASK_ID="1")
    assert len([line for line in slurm.log if line.startswith("srun")]) == 3


CHAIN = "launch/slurm_chain.sh"


def test_a_chain_is_an_array_or_jobs_of_one_name(slurm: FakeSlurm) -> None:
    (slurm.directory / "bin/sbatch").write_text(
        NOTES.replace('"$STUB_LOG"', '"$STUB_LOG"; env | grep FP8TRAIN_ >>"$STUB_LOG"; echo 7')
    )
    (slurm.directory / "bin/sbatch").chmod(0o755)
    done = call(
        CHAIN, "--turns=3", "--nodes=2", "c.yaml", "a.b=x y", cwd=slurm.directory, **slurm.environment
    )
    assert done.returncode == 0, done.stderr
    flags = f"--parsable --no-requeue --job-name=fp8train-c --array=1-3%1 --nodes=2 {SBATCH} c.yaml a.b=x y"
    assert slurm.log[0] == f"sbatch {flags}"
    assert {"FP8TRAIN_CHAIN=array", "FP8TRAIN_REQUEUES=0"} <= set(slurm.log)

    (slurm.directory / "log").unlink()
    more = ("--mode=singleton", "--name=mine", "--turns=2")
    done = call(CHAIN, *more, "c.yaml", cwd=slurm.directory, **slurm.environment)
    flags = f"--parsable --no-requeue --job-name=mine --dependency=singleton {SBATCH} c.yaml"
    assert slurm.log.count(f"sbatch {flags}") == 2
    assert {"FP8TRAIN_TURN=1", "FP8TRAIN_TURN=2", "FP8TRAIN_CHAIN=singleton"} <= set(slurm.log)


def test_a_dry_chain_prints_what_it_would_submit(slurm: FakeSlurm) -> None:
    where = {"cwd": slurm.directory, **slurm.environment}
    done = call(CHAIN, "--dry-run", "--mode=singleton", "--name=n", "--turns=2", "c.yaml", "a=x y", **where)
    assert done.stdout.splitlines() == [
        f"FP8TRAIN_CHAIN=singleton FP8TRAIN_REQUEUES=0 FP8TRAIN_TURN={turn} sbatch --parsable --no-requeue "
        f"--job-name=n --dependency=singleton {SBATCH} c.yaml a=x\\ y"
        for turn in (1, 2)
    ]
    assert not (slurm.directory / "log").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--turns=0", "c.yaml"), "--turns must be a positive number, not '0'"),
        (("--mode=loop", "c.yaml"), "--mode must be array or singleton, not 'loop'"),
        (("--turns=11", "c.yaml"), "--turns=11: an array has at most 10 turns here (MaxArraySize 11)"),
        (("--nodes", "2", "c.yaml"), "write flags of sbatch as --nodes=VALUE"),
        (("--array=1-3", "c.yaml"), "--array is set by --turns"),
    ],
)
def test_a_chain_refuses_what_it_cannot_submit(
    slurm: FakeSlurm, arguments: tuple[str, ...], said: str
) -> None:
    done = call(CHAIN, "--dry-run", *arguments, cwd=slurm.directory, **slurm.environment)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_JOB_ID": ""}, "this is not a Slurm job; submit it:  sbatch launch/slurm.sbatch c.yaml"),
        ({"NPROC": "0"}, "NPROC must be a positive number, not '0'"),
        ({"FP8TRAIN_REQUEUES": "often"}, "FP8TRAIN_REQUEUES must be a number, not 'often'"),
        ({"FP8TRAIN_REQUEUE_ON": "x"}, "FP8TRAIN_REQUEUE_ON must be limit or any, not 'x'"),
        ({"FP8TRAIN_CHAIN": "x"}, "FP8TRAIN_CHAIN must be array or singleton, not 'x'"),
        ({"FP8TRAIN_VENV": "nowhere"}, "FP8TRAIN_VENV: there is no nowhere/bin/python"),
    ],
)
def test_slurm_refuses_what_it_cannot_use(slurm: FakeSlurm, environment: dict[str, str], said: str) -> None:
    result = slurm.run("c.yaml", **environment)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (slurm.directory / "log").exists()


def test_slurm_starts_nothing_with_a_wrong_configuration(slurm: FakeSlurm) -> None:
    config = slurm.directory / "c.yaml"
    config.write_text("optimizer: {lerning_rate: 1}\n")
    result = slurm.run(str(config), FP8TRAIN_VENV=sys.prefix)
    assert result.returncode == 2
    assert "lerning_rate" in result.stderr
    assert "Traceback" not in result.stderr
    assert slurm.log == ["srun --cpu-bind=none --nodes=1 --ntasks=1"]


def test_slurm_usage_names_every_setting() -> None:
    text = SBATCH.read_text()
    usage = text.split("<<'TEXT'")[1].split("\nTEXT\n")[0]
    flags = set(re.findall(r"^#SBATCH (--[a-z-]+)", text, re.MULTILINE)) - {"--ntasks-per-node"}
    variables = set(re.findall(r"\$\{((?:FP8TRAIN|MASTER)_[A-Z_]+|NPROC|OMP_NUM_THREADS)", text))
    assert len(flags) >= 8
    assert len(variables) >= 8
    assert [word for word in sorted(flags | variables) if word not in usage] == []
