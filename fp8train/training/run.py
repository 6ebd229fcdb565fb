"""``fp8train train``: from a resolved configuration to a finished run.

Exit statuses, also in ``status.json``: 0 all steps done, or stopped on request with the state saved; 2
something the user can mend; 3 gradients stayed non-finite; 4 replicas differ; 5 the run hung; 1 a bug (with a
traceback); 130 a second Ctrl-C (state ``interrupted``), whatever else fails while the run is being left.

The last status is written as soon as the last checkpoint is safe, or the failure is known. From then on it is
settled: neither a signal nor an error while trackers and process groups are closed changes it.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import random
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fp8train.checkpoint.catalog import find_checkpoint, sweep_leftovers
from fp8train.checkpoint.errors import NoGoodCheckpointError
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.rollback import complete, roll_back, say_what_counts
from fp8train.checkpoint.visibility import View
from fp8train.comm.failures import INTERRUPTED, PeerFailedError, describe, lost_peers, undisturbed
from fp8train.comm.processes import Layout, Processes, choose_threads, processes
from fp8train.comm.progress import Progress
from fp8train.comm.rendezvous import StoppedBeforeMeetingError
from fp8train.config.argument_keys import naming_keys, with_keys
from fp8train.config.dump import dump_yaml
from fp8train.config.environment import World, world_from_environment
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.data.loading import Data
from fp8train.deepspeed_engine.trainer import DeepSpeedTrainer
from fp8train.kernels.deterministic import use_deterministic_kernels
from fp8train.live.console import Console, print_safely
from fp8train.live.reporter import Reporter
from fp8train.run_dir.claim import HEARTBEATS_DIR, RunDirGoneError, recorded_step
from fp8train.run_dir.directory import RunDir
from fp8train.run_dir.failed import read_failure, report_gone
from fp8train.run_dir.provenance import describe_environment
from fp8train.step.base_trainer import BaseTrainer
from fp8train.step.trainer import Trainer
from fp8train.training.device_rules import check_device
from fp8train.training.faults import Faults
from fp8train.training.initialise import initialise_from
from fp8train.training.loop import Outcome, TrainingLoop
from fp8train.training.memory import explain, is_out_of_memory, keep_snapshot
from fp8train.training.profiling import PROFILE_DIR, profiling
from fp8train.training.ready_run import ReadyRun
from fp8train.training.resume import resume
from fp8train.training.signals import TIME_LIMIT, Stop, StopRequest
from fp8train.training.time_limit import TimeLimit, unmeasured_save_s
from fp8train.watch.last_words import LastWords
from fp8train.watch.watchdog import Watchdog

_logger = logging.getLogger(__name__)
_CAUSE_PATIENCE_S = 1.5
"""How long a rank that lost its peers waits for one of them to say why."""


def run(config: Config, world: World, data: Data, *, console: Console, stop: StopRequest, again: str) -> int:
    """Train in as many processes as torchrun started.

    Args:
        config: what.
        world: this process among them.
        data: from :func:`~fp8train.training.preflight.preflight`.
        console: rank 0's output.
        stop: entered; collects the signals of the whole run.
        again: how the run is continued, for the one who stopped it.

    Returns:
        The exit status.

    Raises:
        UserError: anything the user can mend; nothing that was saved is lost.
        KeyboardInterrupt: a second Ctrl-C.
    """
    prepare_machine(config, world.local_size)
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash, or SIGABRT from a watchdog, shows where
    with ExitStack() as directory, _quitting_interrupts(stop, console, again):
        try:
            return _run(config, data, console, stop, again, directory)
        except StoppedBeforeMeetingError:
            stop.settle(0)
            console.say(f"stopped before all ranks were there\ncontinue with: {again}")
            return 0
        finally:
            # Process groups sit in reference cycles, and gloo's threads end with them alone.
            gc.collect()


def _run(
    config: Config, data: Data, console: Console, stop: StopRequest, again: str, directory: ExitStack
) -> int:
    """Join the job, open the run directory, which ``directory`` closes, and train in it."""
    progress = Progress()
    layout = Layout(config.parallel.pp, config.parallel.cp, config.parallel.tp)
    with processes(
        config.run.device,
        layout=layout,
        timeout_s=config.watchdog.collective_timeout_s,
        startup_timeout_s=config.watchdog.startup_timeout_s,
        stopping=lambda: stop.asked,
    ) as procs:
        check_device(config, procs.device)
        seed_generators(config.run.seed, procs.rank)
        run_dir = RunDir.open(
            config.run.dir,
            config.run.name,
            resume=config.checkpoint.resume,
            overwrite=config.run.overwrite,
            group=procs.control,
        )
        directory.callback(run_dir.close)
        run = _Run(run_dir, config, procs, data, console, stop, progress)
        stop.stop_file, stop.gone = run_dir.stop_file, run_dir.taken_away
        stop.say = partial(_say, run_dir, console)
        stop.on_quit = lambda: _write_interrupted(run_dir, run.done)
        if config.run.time_limit_minutes is not None:
            stop.limit = TimeLimit(config.run.time_limit_minutes)
            progress.listeners.append(stop.limit.listen)
        try:
            with _warnings_to(run_dir, console), _watched(run):
                return run.to_the_end(again)
        finally:
            stop.limit = None  # from here on nothing may hold a process group
            if stop.settled is None:
                stop.on_quit = partial(_write_interrupted, run_dir, run.done)


@contextmanager
def _quitting_interrupts(stop: StopRequest, console: Console, again: str) -> Iterator[None]:
    """Once a second Ctrl-C came, whatever is raised is its consequence, on this rank or another: the status
    says so, and the command ends as interrupted."""
    try:
        yield
    except BaseException as error:
        if not stop.quitting or stop.settled is not None:
            raise
        if stop.on_quit is not None:
            stop.on_quit()
            console.say(f"continue from the newest checkpoint with: {again}")
        raise KeyboardInterrupt from error
    finally:
        stop.on_quit = None


def prepare_machine(config: Config, local_world_size: int) -> None:
    """Threads and determinism, before any tensor work."""
    torch.set_num_threads(choose_threads(config.run.threads, local_world_size))
    if config.run.deterministic:
        use_deterministic_kernels()


def seed_generators(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch, differently on each rank. Weights and data order do not draw from
    them."""
    mixed = (seed * 1_000_003 + rank) % 2**63
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def _say(run_dir: RunDir, console: Console, text: str) -> None:
    """A line for the person watching, and for the rank's log."""
    run_dir.log(text)
    console.say(text)


def _write_interrupted(run_dir: RunDir, step: int) -> None:
    """The status of a run that a second Ctrl-C ended."""
    run_dir.write_status("interrupted", step=step, reason="second Ctrl-C", exit_code=INTERRUPTED)


@dataclass
class _Run:
    """A run in its directory, from its claim to its last status."""

    run_dir: RunDir
    config: Config
    procs: Processes
    data: Data
    console: Console
    stop: StopRequest
    progress: Progress
    loop: TrainingLoop | None = None
    """Once there is one; a refused resume undoes nothing."""
    ended: Outcome | None = None
    """Once the run has ended well."""

    @property
    def done(self) -> int:
        """Steps done."""
        return recorded_step(self.run_dir.path) if self.loop is None else self.loop.done

    def to_the_end(self, again: str) -> int:
        """Train, and say what can be done next (``again``: how to continue)."""
        try:
            outcome = self._stop_at_start()
            if outcome is None:
                with naming_keys():
                    outcome = self._train()
            else:
                self.run_dir.log_event(outcome.state, step=outcome.step, reason=outcome.reason)
                self._settle(outcome)
                _say(self.run_dir, self.console, f"{outcome.state} before training began: {outcome.reason}")
        except BaseException as error:
            if self.ended is not None:  # saved, and on record
                _logger.warning("after the run had ended: %s: %s", type(error).__name__, error)
                outcome = self.ended
            elif self.stop.quitting:
                raise  # the caller knows
            else:
                explained = self._failed(error)
                if explained is error:
                    raise
                raise explained from error
        if outcome.state != "completed":
            self.console.say(f"continue with: {again}")
        elif any(self.run_dir.path.glob("tokenizer.*")) and self.config.checkpoint.save_at_end:
            self.console.say(f"try it: fp8train generate {shlex.quote(str(self.run_dir.path))} --prompt TEXT")
        return 0

    def _settle(self, outcome: Outcome) -> None:
        """The run ended well: nothing that comes now changes that."""
        self.ended = outcome
        write = partial(
            self.run_dir.write_status, outcome.state, step=outcome.step, reason=outcome.reason, exit_code=0
        )
        self.stop.settle(0, write)
        write()

    def _failed(self, error: BaseException) -> BaseException:
        """Put the failure on record; what a person can do something with in place of ``error``."""
        with undisturbed():
            step = None if self.loop is None else self.loop.done + 1
            explained = _explain(error, self.run_dir, self.config, self.procs, step=step)
            failure = describe(explained)
            if not isinstance(error, RunDirGoneError):  # else it may be another job's by now
                self.run_dir.write_failure(failure, step=self.done)
            self.stop.settle(failure.exit_status)
        return explained

    def _stop_at_start(self) -> Outcome | None:
        """A stop that was asked for before the loop, at which nothing is lost. Collective.

        Raises:
            ConfigError: the time limit is over already: a run that comes back would never get anywhere.
        """
        stop = self._agree_to_stop()
        if stop is None:
            return None
        if stop.reason == TIME_LIMIT:
            raise ConfigError(
                f"run.time_limit_minutes: {self.config.run.time_limit_minutes:g} was over before the first "
                "step; it counts from the start of the process, so give starting, a step and a save more time"
            )
        self.run_dir.clear_stop()
        return Outcome(stop.state, stop.reason, self.done)

    def _agree_to_stop(self) -> Stop | None:
        with self.procs.control_calls.held("agreement on stopping"):
            return self.stop.agree(self.procs.control)

    def _train(self) -> Outcome:
        run_dir, config, procs, data = self.run_dir, self.config, self.procs, self.data
        _tidy(run_dir, config, procs)
        checkpoint = _newest(run_dir, config, procs)
        source = None if checkpoint is not None else _source(run_dir, config, procs)
        faults = Faults(config, run_dir, self.progress)
        self.progress.enter("build")
        trainer = _build(config, procs, data)
        trainer.progress = self.progress
        _keep_tokenizer(run_dir, data)
        with Reporter(run_dir, data, trainer, self.console) as reporter:
            reporter.header()
            faults.watch(trainer, reporter.warn)
            ready = ReadyRun(run_dir, data, trainer, reporter)
            self.progress.enter("restore")
            step = 0 if checkpoint is None else resume(ready, checkpoint)
            outcome = self._stop_at_start()  # building may have taken minutes
            if outcome is None:
                if checkpoint is not None:
                    _continue_from(run_dir, config, procs, checkpoint, step)
                outcome = self._loop(ready, source, step, faults)
            self._settle(outcome)
            self.progress.enter("end")
            reporter.end(outcome.state, outcome.reason, outcome.step)
            return outcome

    def _loop(self, ready: ReadyRun, source: Path | None, start: int, faults: Faults) -> Outcome:
        """From here on there is a run to lose."""
        run_dir, procs = self.run_dir, self.procs
        self.loop = loop = TrainingLoop(ready, agree_to_stop=self._agree_to_stop, start=start)
        faults.watch_saves(loop.saving)
        if self.stop.limit is not None:
            parameters = sum(p.numel() for p in ready.trainer.outline.parameters())
            unmeasured = unmeasured_save_s(parameters, procs.world_size)
            self.stop.limit.save_seconds = lambda: loop.saving.longest_s or unmeasured
        run_dir.truncate_after(start or None)
        if source is not None:
            initialise_from(ready, source)
        run_dir.write_description(dump_yaml(self.config), describe_environment(procs.device))
        run_dir.write_status("running", step=start)
        self.stop.plan = f"saving to {run_dir.checkpoints} after this step"
        directory, settings = run_dir.path / PROFILE_DIR, self.config.profile
        with profiling(settings, directory, self.progress, ready.reporter, rank=procs.rank):
            return loop.run()


def _watched(run: _Run) -> AbstractContextManager[object]:
    """The watchdog of a run, from its claim to its last status."""
    settings, procs, run_dir = run.config.watchdog, run.procs, run.run_dir
    if not settings.enabled:
        return nullcontext()

    def say(text: str) -> None:
        run.console.clear()
        print_safely(f"{text}\n", sys.stderr)

    return Watchdog(
        settings,
        run_dir.path / HEARTBEATS_DIR,
        run.progress,
        procs.calls,
        rank=procs.rank,
        world_size=procs.world_size,
        several_machines=procs.world_size > world_from_environment().local_size,
        end=LastWords(settings, run_dir, lambda: run.done, lambda: run.stop.settled, say),
    )


def _explain(
    error: BaseException, run_dir: RunDir, config: Config, procs: Processes, *, step: int | None
) -> BaseException:
    """``error``, or what a person can do something with in its place."""
    if is_out_of_memory(error):
        directory, rank = run_dir.path / PROFILE_DIR, procs.rank
        held = keep_snapshot(error, directory, rank=rank, log=run_dir.log)
        return explain(error, config, rank=rank, dp=procs.dp.size, step=step, held=held)
    if lost_peers(error):
        first = read_failure(run_dir.path, patience_s=_CAUSE_PATIENCE_S)
        if first is None or first.peers_lost:
            first = report_gone(run_dir.path, procs.peers, step=max(0, (step or 0) - 1))
        if first is not None:
            return PeerFailedError(first)
    return error


def _tidy(run_dir: RunDir, config: Config, procs: Processes) -> None:
    """Finish what a killed job left half done among the checkpoints."""

    def tidy() -> None:
        sweep_leftovers(run_dir.checkpoints)
        complete(run_dir.checkpoints)
        say_what_counts(run_dir.checkpoints, config.checkpoint.resume)

    Ranks(procs.control, procs.control_calls).first(tidy)


def _continue_from(run_dir: RunDir, config: Config, procs: Processes, checkpoint: Path, step: int) -> None:
    """Put a rollback on record before anything is cut or trained."""
    root, resume = run_dir.checkpoints, config.checkpoint.resume
    ranks = Ranks(procs.control, procs.control_calls)
    ranks.first(lambda: roll_back(root, resume, checkpoint, step))


def _newest(run_dir: RunDir, config: Config, procs: Processes) -> Path | None:
    """The verified checkpoint that the run continues from, if it does."""
    resume, verify = config.checkpoint.resume, config.checkpoint.verify
    view = View(config.checkpoint.visibility_timeout_s)
    try:
        return find_checkpoint(run_dir.checkpoints, resume, group=procs.control, verify=verify, view=view)
    except NoGoodCheckpointError as error:
        raise NoGoodCheckpointError(
            f"{error}, or start afresh under another run.name or with run.overwrite=true"
        ) from None


def _source(run_dir: RunDir, config: Config, procs: Processes) -> Path | None:
    """The verified checkpoint that a new run starts from, if it does."""
    if config.checkpoint.init_from is None:
        return None
    path, verify = config.checkpoint.init_from, config.checkpoint.verify
    source = find_checkpoint(
        run_dir.checkpoints,
        path,
        group=procs.control,
        key="init_from",
        verify=verify,
        view=View(config.checkpoint.visibility_timeout_s),
    )
    assert source is not None
    return source


def _build(config: Config, procs: Processes, data: Data) -> BaseTrainer:
    ignore_after = data.eod_id if config.data.mask_end_of_document else None
    kind: type[Trainer] | type[DeepSpeedTrainer] = Trainer
    if config.engine == "deepspeed":
        kind = DeepSpeedTrainer
    try:
        return kind(config, procs, vocab_size=data.vocab_size, ignore_after=ignore_after)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _keep_tokenizer(run_dir: RunDir, data: Data) -> None:
    """Copy the tokenizer into the run directory, so that a checkpoint can be used without the dataset."""
    if data.tokenizer is not None:
        run_dir.keep(f"tokenizer{data.tokenizer.path.suffix or '.model'}", data.tokenizer.path)


@contextmanager
def _warnings_to(run_dir: RunDir, console: Console) -> Iterator[None]:
    """Send the package's warnings to stderr (rank 0) and to this rank's log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = with_keys(f"{record.levelname.lower()}: {record.getMessage()}")
            run_dir.log(text)
            if run_dir.rank == 0:
                console.clear()
                print_safely(f"{text}\n", sys.stderr)

    handler, logger = Handler(), logging.getLogger("fp8train")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
