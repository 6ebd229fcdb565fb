"""``fp8train train``: from a resolved configuration to a finished run.

Exit statuses, also in ``status.json``: 0 all steps done, or stopped on request with the state saved; 2
something the user can mend; 3 gradients stayed non-finite; 4 replicas differ; 1 a bug (with a traceback); 130
a second Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fp8train.checkpoint import find_checkpoint, sweep_leftovers
from fp8train.comm.failures import PeerFailedError, describe, lost_peers, undisturbed
from fp8train.comm.processes import Layout, Processes, choose_threads, processes
from fp8train.config.dump import dump_yaml
from fp8train.config.environment import World
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.data.loading import Data
from fp8train.training.environment import describe_environment
from fp8train.training.initialise import initialise_from
from fp8train.training.loop import TrainingLoop
from fp8train.training.memory import explain, is_out_of_memory
from fp8train.training.reporter import Reporter
from fp8train.training.resume import resume
from fp8train.training.run_dir import RunDir
from fp8train.training.signals import StopRequest
from fp8train.training.trainer import Trainer


def run(config: Config, world: World, data: Data) -> int:
    """Train in as many processes as torchrun started.

    Args:
        config: what.
        world: this process among them.
        data: from :func:`~fp8train.training.preflight.preflight`.

    Returns:
        The exit status.

    Raises:
        UserError: anything the user can mend; nothing that was saved is lost.
    """
    prepare_machine(config, world.local_size)
    with processes(config.run.device, layout=layout_of(config)) as procs:
        seed_generators(config.run.seed, procs.rank)
        run_dir = RunDir.open(
            config.run.dir,
            config.run.name,
            resume=config.checkpoint.resume,
            overwrite=config.run.overwrite,
            group=procs.control,
        )
        try:
            with _warnings_to(run_dir):
                return _run_in(run_dir, config, procs, data)
        finally:
            run_dir.close()


def layout_of(config: Config) -> Layout:
    """The ranks of a copy of the model."""
    return Layout(config.parallel.pp, config.parallel.cp, config.parallel.tp)


def prepare_machine(config: Config, local_world_size: int) -> None:
    """Threads and determinism, before any tensor work."""
    torch.set_num_threads(choose_threads(config.run.threads, local_world_size))
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)


def seed_generators(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch, differently on each rank. Weights and data order do not draw from
    them."""
    mixed = (seed * 1_000_003 + rank) % 2**63
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def _run_in(run_dir: RunDir, config: Config, procs: Processes, data: Data) -> int:
    step, loop = 0, None
    try:
        if procs.rank == 0:
            sweep_leftovers(run_dir.checkpoints)
        checkpoint = find_checkpoint(
            run_dir.checkpoints,
            config.checkpoint.resume,
            group=procs.control,
            verify=config.checkpoint.verify,
        )
        source = None if checkpoint is not None else _source(run_dir, config, procs)
        trainer = _build(config, procs, data)
        _keep_tokenizer(run_dir, data)
        with (
            StopRequest(run_dir.stop_file) as stop,
            Reporter(
                config,
                processes=procs,
                run_dir=run_dir,
                trainer=trainer,
                vocab_size=data.vocab_size,
                samples_before=data.train.samples_before,
            ) as reporter,
        ):
            reporter.header(data)
            if checkpoint is not None:
                step = resume(
                    checkpoint, config, processes=procs, trainer=trainer, data=data, reporter=reporter
                )
            loop = TrainingLoop(
                config,
                processes=procs,
                run_dir=run_dir,
                data=data,
                trainer=trainer,
                reporter=reporter,
                stop_reason=lambda: stop.agree(procs.control),
                start=step,
            )
            run_dir.truncate_after(step or None)
            if source is not None:
                initialise_from(
                    source,
                    config,
                    processes=procs,
                    trainer=trainer,
                    reporter=reporter,
                    tokenizer=data.tokenizer,
                )
            run_dir.write_description(dump_yaml(config), describe_environment(procs.device))
            run_dir.write_status("running", step=step)
            outcome = loop.run()
            reporter.end(outcome.state, outcome.reason, outcome.step)
    except BaseException as error:
        with undisturbed():
            explained = _explain(error, run_dir, config, procs, step=None if loop is None else loop.done + 1)
            done = run_dir.recorded_step() if loop is None else loop.done  # a refused resume undoes nothing
            run_dir.write_failure(describe(explained), step=done)
        if explained is error:
            raise
        raise explained from error
    run_dir.write_status(outcome.state, step=outcome.step, reason=outcome.reason, exit_code=0)
    return 0


def _explain(
    error: BaseException, run_dir: RunDir, config: Config, procs: Processes, *, step: int | None
) -> BaseException:
    """``error``, or what a person can do something with in its place."""
    if is_out_of_memory(error):
        return explain(error, config, rank=procs.rank, dp=procs.dp.size, step=step)
    first = run_dir.failure()
    if first is not None and not first.peers_lost and lost_peers(error):
        return PeerFailedError(first)
    return error


def _source(run_dir: RunDir, config: Config, procs: Processes) -> Path | None:
    """The verified checkpoint that a new run starts from, if it does."""
    if config.checkpoint.init_from is None:
        return None
    key, path = "checkpoint.init_from", config.checkpoint.init_from
    verify = config.checkpoint.verify
    source = find_checkpoint(run_dir.checkpoints, path, group=procs.control, key=key, verify=verify)
    assert source is not None
    return source


def _build(config: Config, procs: Processes, data: Data) -> Trainer:
    ignore_after = data.eod_id if config.data.mask_end_of_document else None
    try:
        return Trainer(config, procs, vocab_size=data.vocab_size, ignore_after=ignore_after)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _keep_tokenizer(run_dir: RunDir, data: Data) -> None:
    """Copy the tokenizer into the run directory, so that a checkpoint can be used without the dataset."""
    if run_dir.rank == 0 and data.tokenizer is not None:
        suffix = data.tokenizer.path.suffix or ".model"
        shutil.copyfile(data.tokenizer.path, run_dir.path / f"tokenizer{suffix}")


@contextmanager
def _warnings_to(run_dir: RunDir) -> Iterator[None]:
    """Send the package's warnings to stderr (rank 0) and to this rank's log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = f"{record.levelname.lower()}: {record.getMessage()}"
            run_dir.log(text)
            if run_dir.rank == 0:
                print(text, file=sys.stderr, flush=True)

    handler, logger = Handler(), logging.getLogger("fp8train")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
