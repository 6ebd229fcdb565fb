"""Faults on purpose (``debug.fault_injection``): when they strike.

Faults listen to the run's progress and to the moments of its saves, so an undisturbed run has no trace of
them. Before a fault strikes, a file in the run directory (``faults/``) says so: the same command, started
again, is not hit twice. :mod:`fp8train.training.strikes` says what they do.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fp8train.checkpoint.save import SavePhase
from fp8train.comm.progress import Progress
from fp8train.config.debug_schema import IN_FORWARD, FaultConfig
from fp8train.config.schema import Config, to_plain
from fp8train.run_dir.claim import FAULTS_DIR
from fp8train.run_dir.directory import RunDir
from fp8train.step.base_trainer import BaseTrainer
from fp8train.training.saving import Saving
from fp8train.training.strikes import bend, fill_disk, find_module, find_tensor, flip_bit, strike_process

_logger = logging.getLogger(__name__)


class Faults:
    """The faults of this rank; of a run without any, nothing.

    Attributes:
        waiting: those that have not struck.
    """

    def __init__(self, config: Config, run_dir: RunDir, progress: Progress) -> None:
        """Strike as ``progress`` and, later, a watched save come to the moments that ``config`` names."""
        self._run_dir, self._progress = run_dir, progress
        self._trainer: BaseTrainer | None = None
        self._lasting: list[tuple[FaultConfig, Callable[[], None]]] = []
        self._all = config.debug.fault_injection
        mine = [fault for fault in self._all if fault.rank in ("all", run_dir.rank)]
        self.waiting = [f for f in mine if f.every_start or not self._marker(f).exists()]
        if self.waiting:
            progress.listeners.append(self._listen)

    def watch(self, trainer: BaseTrainer, warn: Callable[[str], None]) -> None:
        """There is a model now; ``warn`` of what is going to happen to it, on any rank.

        Raises:
            ConfigError: a fault is about a module or tensor that it does not have.
        """
        self._trainer = trainer
        for fault in self._all:
            warn(f"FAULT INJECTION is on (debug.fault_injection): {fault}")
        for fault in self.waiting:
            if fault.kind in IN_FORWARD:
                find_module(fault, trainer.model)
            elif fault.kind == "bit_flip_weight":
                find_tensor(fault, trainer)

    def watch_saves(self, saving: Saving) -> None:
        """Strike at the moments of its saves, too; on a thread of its own where it writes on one."""
        if self.waiting:
            saving.on_phase = partial(self._at_save, saving)

    def _at_save(self, saving: Saving, phase: SavePhase) -> None:
        if saving.saved_at is not None:
            self._strike(saving.saved_at, f"save_{phase}")

    def _listen(self, progress: Progress) -> None:
        step = progress.step + 1
        self._end(step, progress.phase)
        self._strike(step, progress.phase)
        if progress.phase == "end":
            for fault in self.waiting:
                _logger.warning("injected fault that never struck: %s", fault)

    def _strike(self, step: int, phase: str) -> None:
        for fault, _ in [*self._lasting]:
            if fault.kind == "slow" and fault.phase == phase:
                strike_process(fault)
        for fault in [*self.waiting]:
            if (fault.step, fault.phase) == (step, phase):
                self.waiting.remove(fault)
                self._tell(fault)
                self._act(fault)

    def _end(self, step: int, phase: str) -> None:
        """End what has lasted long enough; a bent forward pass before an evaluation makes another one."""
        for one in [*self._lasting]:
            fault, end = one
            if step > fault.last_step or (
                step == fault.last_step and phase == "report" and fault.kind in IN_FORWARD
            ):
                self._lasting.remove(one)
                end()

    def _act(self, fault: FaultConfig) -> None:
        if fault.kind == "disk_full":
            self._lasting.append((fault, fill_disk(self._folder)))
        elif fault.kind in IN_FORWARD:
            assert self._trainer is not None
            self._lasting.append((fault, bend(fault, self._trainer.model)))
        elif fault.kind == "bit_flip_weight":
            assert self._trainer is not None
            flip_bit(fault, find_tensor(fault, self._trainer))
        else:
            strike_process(fault)
            if fault.kind == "slow":
                self._lasting.append((fault, lambda: None))

    def _tell(self, fault: FaultConfig) -> None:
        """Leave word in every place that there is, first where a restart looks."""
        record = {"time": time.time(), "pid": os.getpid(), **to_plain(fault), "rank": self._run_dir.rank}
        self._folder.mkdir(exist_ok=True)
        self._marker(fault).write_text(json.dumps(record) + "\n")
        _logger.warning("INJECTED FAULT: %s", fault)
        # Only rank 0 writes events, but it cannot know of this one.
        as_rank_0, rank = replace(self._run_dir, rank=0), self._run_dir.rank
        as_rank_0.log_event("fault", step=fault.step, fault=fault.kind, rank=rank, phase=fault.phase)

    @property
    def _folder(self) -> Path:
        return self._run_dir.path / FAULTS_DIR

    def _marker(self, fault: FaultConfig) -> Path:
        """Also knows the details: a fault that was edited is another one."""
        details = zlib.crc32(json.dumps(to_plain(fault), sort_keys=True).encode())
        name = f"{fault.kind}_step{fault.step}_{fault.phase}_{details:08x}.rank{self._run_dir.rank}.json"
        return self._folder / name
