"""``python -m fp8train.launch``: what the scripts in ``launch/`` start, torchrun with our own last words.

The run is checked once (:mod:`fp8train.training.preflight`) before any process starts. Then torchrun's agent
starts the ranks as always. torchrun itself would answer the failure of a rank with fifty lines of its own and
status 1; here ranks leave their failures in a folder, and when all have ended the one behind the others is
told once, last on the screen, and its status is ours. Of torchrun this uses ``parse_args`` and ``run`` alone,
which other launchers (accelerate) build on too.

Set ``LOGLEVEL`` (say, to ``INFO``) to hear what torchrun's agent says.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fp8train.comm.failures import FOLDER_VARIABLE, INTERRUPTED, Failure, cause, recorded
from fp8train.config.environment import World, check_started_world
from fp8train.config.errors import UserError
from fp8train.config.resolve import ResolvedConfig, load_config
from fp8train.run_dir.failed import amend_failure, read_failure, read_status
from fp8train.training.preflight import preflight, run_path

_ELSEWHERE_S = 3.0

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, start and end a run; the exit status."""
    options = _parse(arguments)
    world_size = options.nnodes * options.nproc_per_node
    try:
        check_started_world(world_size)
        resolved = load_config(options.config, options.overrides)
        if options.node_rank == 0:
            preflight(resolved, World(world_size))
        if options.check:
            print(run_path(resolved.config).absolute())
            return 0
        return _launch(options, resolved)
    except UserError as error:
        if options.debug:
            raise
        return _tell(Failure(0, str(error), error.exit_status))
    except KeyboardInterrupt:
        return _tell(Failure(0, "interrupted", INTERRUPTED))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage is that of the script in front, which has its own."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; settings are written section.key=value, see --help\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser("python -m fp8train.launch", description="Train in several processes.")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes on this machine")
    parser.add_argument("--nnodes", type=int, default=1, help="machines; each runs this command")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--master-addr", help="address of machine 0; needed with several")
    parser.add_argument("--master-port", type=int, help="a free port there; needed with several")
    parser.add_argument("--debug", action="store_true", help="torchrun's own output, and all tracebacks")
    parser.add_argument("--check", action="store_true", help="only check; print the run directory")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, laid over the file in order")
    options = parser.parse_intermixed_args(arguments)
    if options.nnodes > 1 and not options.check and None in (options.master_addr, options.master_port):
        parser.error("several machines need --master-addr and --master-port")
    return options


def _launch(options: argparse.Namespace, resolved: ResolvedConfig) -> int:
    # After the check, for they cost a second.
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    from fp8train.comm.processes import choose_device

    choose_device(resolved.config.run.device, options.nproc_per_node - 1)
    train = ["-m", "fp8train", "train", options.config, *options.overrides]
    command = [*_torchrun_options(options, resolved.config.watchdog.startup_timeout_s), *train]
    if options.debug:
        run(parse_args([*command, "--debug"]))
        return 0
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="fp8train_") as folder, _second_ctrl_c() as quitting:
        os.environ[FOLDER_VARIABLE] = folder
        try:
            run(parse_args(command))
        except ChildFailedError as error:
            job = _Job(run_path(resolved.config), started, quitting=quitting.is_set())
            return _tell(job.cause(recorded(Path(folder)), error.failures))
        except SignalException as error:
            job = _Job(run_path(resolved.config), started, quitting=quitting.is_set())
            return job.signalled(signal.Signals(error.sigval))
        except (DistNetworkError, DistStoreError, RendezvousError) as error:
            where = f" at {options.master_addr}:{options.master_port}" if options.master_addr else ""
            raise UserError(
                f"the machines could not meet{where} ({str(error).splitlines()[0]:.160})\n"
                "is the port free, the address that of machine 0, and has every machine started?"
            ) from error
        finally:
            del os.environ[FOLDER_VARIABLE]
    return 0


@contextmanager
def _second_ctrl_c() -> Iterator[threading.Event]:
    """Whether somebody wants the run to end now, as ``launch/torchrun.sh`` says with SIGUSR1: ranks that are
    killed then were not killed by a machine."""
    asked = threading.Event()
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGUSR1, previous)


def _torchrun_options(options: argparse.Namespace, startup_timeout_s: float) -> list[str]:
    if options.master_addr is None:
        return ["--standalone", f"--nproc-per-node={options.nproc_per_node}"]
    # Static rendezvous: machine 0 is the first, so rank 0 runs there.
    return [
        f"--nnodes={options.nnodes}",
        f"--node-rank={options.node_rank}",
        f"--nproc-per-node={options.nproc_per_node}",
        f"--master-addr={options.master_addr}",
        f"--master-port={options.master_port}",
        f"--rdzv-conf=timeout={startup_timeout_s:.0f}",
    ]


@dataclass(frozen=True)
class _Job:
    """The ranks of this machine, once they have ended."""

    run_dir: Path
    started: float
    """Seconds since 1970; what the run directory tells from before is about an earlier job."""
    quitting: bool
    """A second Ctrl-C came."""

    def cause(self, failures: list[Failure], ended: Mapping[int, ProcessFailure]) -> Failure:
        """Why the ranks ended, and the run directory tells the same.

        Args:
            failures: that they have left.
            ended: how those ended that failed.
        """
        first = cause(failures)
        if first is None or first.peers_lost:
            spoken = {failure.rank for failure in failures}
            silent = [self._silent(rank, one.exitcode) for rank, one in ended.items() if rank not in spoken]
            killed = cause(silent)
            if killed is not None and (first is None or not killed.peers_lost):
                first = killed
                amend_failure(self.run_dir, killed)
        assert first is not None
        if first.peers_lost:  # a rank of another machine may know
            elsewhere = read_failure(self.run_dir, patience_s=_ELSEWHERE_S)
            if elsewhere is not None and elsewhere.time >= self.started:
                return elsewhere
        return first

    def signalled(self, number: signal.Signals) -> int:
        """This process was told to end, and has ended the ranks: as the run directory tells it."""
        status = read_status(self.run_dir)
        if status is not None and status["exit_code"] is not None and status["time"] >= self.started:
            return int(status["exit_code"])
        failure = Failure(0, f"ended by {number.name} before the run was saved", 128 + number)
        amend_failure(self.run_dir, failure)
        return _tell(failure)

    def _silent(self, rank: int, status: int) -> Failure:
        return Failure(rank, "interrupted", INTERRUPTED) if self.quitting else _silent(rank, status)


def _silent(rank: int, status: int) -> Failure:
    """The failure of a rank that left no word; ``status`` is negative for a signal."""
    if status == INTERRUPTED:
        return Failure(rank, "interrupted", INTERRUPTED)
    if status >= 0:
        return Failure(rank, f"rank {rank} ended with status {status} and left no word", 1, time=time.time())
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    if status == -signal.SIGTERM:  # torchrun's way to end the peers of a rank that failed
        return Failure(rank, f"rank {rank} was ended by {name}", 1, peers_lost=True, time=time.time())
    hint = ""
    if status == -signal.SIGKILL:
        hint = "\nLinux does that to a process when the machine is out of memory: see dmesg, and lower "
        hint += "train.micro_batch_size or start fewer processes per machine"
    return Failure(rank, f"rank {rank} was killed by {name}{hint}", 1)


def _tell(failure: Failure) -> int:
    """Print the last word on a run; its exit status."""
    print(failure.last_word(), file=sys.stderr, flush=True)
    return failure.exit_status


if __name__ == "__main__":
    sys.exit(main())
