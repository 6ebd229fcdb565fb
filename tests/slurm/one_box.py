"""A Slurm cluster on one machine: a controller and two nodes with two pretended GPUs each, for the tests.

Everything (configuration, keys, sockets, state, logs) lies in one folder and runs as the calling user, so an
installed Slurm is not touched. Needs the programs of Debian's ``slurm-wlm`` and ``munge``. Both nodes are
this machine under two names and ports; the first has its real name, because that is the address where the
ranks of a job meet.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.free_ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

CONFIG = """
ClusterName=onebox
SlurmctldHost=HOST(127.0.0.1)
SlurmctldPort=PORT0
SlurmUser=USER
SlurmdUser=USER
AuthType=auth/munge
AuthInfo=socket=DIR/munge.socket
StateSaveLocation=DIR/state
SlurmctldPidFile=DIR/slurmctld.pid
SlurmctldLogFile=DIR/slurmctld.log
SlurmdSpoolDir=DIR/spool-%n
SlurmdPidFile=DIR/slurmd-%n.pid
SlurmdLogFile=DIR/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=10
FirstJobId=JOB
GresTypes=gpu
NodeName=HOST NodeHostname=HOST NodeAddr=127.0.0.1 Port=PORT1 CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=HOST-b NodeHostname=HOST NodeAddr=127.0.0.1 Port=PORT2 CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing_programs() -> list[str]:
    """Which of the programs are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


class OneBoxCluster:
    """Runs the cluster while it is entered.

    Attributes:
        directory: where everything lies.
        environment: what ``sbatch``, ``scontrol`` and ``squeue`` need in order to reach it.
        nodes: the names of its nodes, that of this machine first.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "PATH": PATH,
            "SLURM_CONF": str(directory / "slurm.conf"),
        }
        host = socket.gethostname().split(".")[0]
        self.nodes = (host, f"{host}-b")
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> OneBoxCluster:
        (self.directory / "state").mkdir(parents=True)
        self._write_config(*self.nodes)
        try:
            folder = str(self.directory)
            munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
            # Forced: it minds that other users cannot reach the socket.
            self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
            self._until(lambda: (self.directory / "munge.socket").exists(), "munged does not answer")
            self._start("slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
            for node in self.nodes:
                self._start("slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node)
            self._until(lambda: self._idle_nodes() == len(self.nodes), "the nodes did not join")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command against the cluster and return what it prints. Raises ``CalledProcessError``."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        ).stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _write_config(self, host: str, second: str) -> None:
        text = CONFIG.replace("HOST", host).replace("USER", getpass.getuser())
        # The rendezvous port of a job comes from its id: two such clusters must not count from the same.
        text = text.replace("JOB", str(1 + secrets.randbelow(1_000_000)))
        for number, port in enumerate(free_ports(3)):
            text = text.replace(f"PORT{number}", str(port))
        (self.directory / "slurm.conf").write_text(text.replace("DIR", str(self.directory)))
        lines = ["AutoDetect=off"]
        for gpu in range(2):
            (self.directory / f"gpu{gpu}").touch()
            lines.append(f"NodeName={host},{second} Name=gpu File={self.directory}/gpu{gpu}")
        (self.directory / "gres.conf").write_text("\n".join(lines) + "\n")
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start(self, *command: str) -> None:
        log = (self.directory / f"daemon-{len(self._daemons)}-{command[0]}.out").open("wb")
        with log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _idle_nodes(self) -> int:
        try:
            states = self.call("sinfo", "--noheader", "--Node", "--format=%T")
        except subprocess.CalledProcessError:
            return 0
        return states.split().count("idle")

    def _until(self, condition: Callable[[], bool], complaint: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = sorted([*self.directory.glob("*.out"), *self.directory.glob("*.log")])
                tails = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
                raise RuntimeError("\n".join([complaint, f"ended: {dead}", *tails]))
            time.sleep(0.1)

    def _stop(self) -> None:
        """End what still runs, then the daemons: a job outlives its node's daemon."""
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
            self.call("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + 30.0
            while self.call("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
