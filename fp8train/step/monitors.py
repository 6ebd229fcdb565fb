"""What is watched while a run trains: FP8 casts, the guard over them, flushed states, query projections.

Statistics of the whole model are put together from the ranks that hold its parts, so most methods are
collective; all wait for the device and are called on the steps that are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.models.build import BuiltModel
from fp8train.numerics.scale_state import ScaleState
from fp8train.numerics.statistics import CastRecorder
from fp8train.optim.optimizer import Optimizer
from fp8train.parallel.pipeline import Pipeline
from fp8train.step.guard import Flag, Guard, agreed_readings
from fp8train.step.measured import Measured
from fp8train.step.spikes import SpikeDetector

WEIGHT_USE = ".w"
"""End of the names of weights among operand uses; a weight is cast once a step, perhaps before its step."""


class Monitors:
    """The monitors of one process: what it records of a step, and the guard that acts on it.

    Attributes:
        recorder: FP8 cast statistics; None without FP8 or with statistics off.
        guard: which linears are out of FP8 for a while; None if it is off.
        spikes: judges loss and gradient norm; None if it is off.
        rewinds: how often the run went back to a checkpoint.
        scales: delayed scales of this rank's linears, which the guard may have forgotten; None without any.
        pipeline: whose ranks hold the rest of the model; None with one stage. Set once it is built.
        whole: a context in which parameters have their values outside of their modules.
    """

    def __init__(self, config: Config, processes: Processes, built: BuiltModel) -> None:
        """``built``: the model, whose linears are connected to the recorder later."""
        self.config, self.processes, self.built = config, processes, built
        self.pipeline: Pipeline | None = None
        self.whole: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.recorder = self._make_recorder()
        self.guard: Guard | None = None
        self.scales: ScaleState | None = None
        if config.precision.guard.action != "off" and built.fp8 is not None:
            self.guard = Guard(
                config.precision.guard, built.fp8.converted, delayed=self._has_delayed_scales()
            )
        self.spikes = SpikeDetector(config.spikes) if config.spikes.action != "off" else None
        self.rewinds = 0
        self._applied: dict[str, int] = {}

    def _has_delayed_scales(self) -> bool:
        quant = self.config.precision.gemm.value()
        casts = {} if quant is None else quant.casts()
        return any(
            spec.scale_source == "delayed" and not use.endswith(WEIGHT_USE) for use, spec in casts.items()
        )

    @property
    def may_rewind(self) -> bool:
        """Whether the run may go back to a checkpoint once more."""
        return self.rewinds < self.config.spikes.max_rollbacks

    def _make_recorder(self) -> CastRecorder | None:
        """With sites of the whole model; this process records those that it holds."""
        if self.built.fp8 is None or self.config.logging.cast_statistics_interval == 0:
            return None
        if self.built.fp8.native:  # whose casts nobody sees
            return None
        operands = ["x", "w", "grad_output"]
        if self.config.precision.gradient.format != "high_precision":
            operands.append("grad_weight")
        sites = [f"{path}/{operand}" for path in self.built.fp8.converted for operand in operands]
        return CastRecorder(sites, self.processes.device)

    @property
    def sampled(self) -> bool:
        """Whether the current step's casts are recorded."""
        return self.recorder is not None and self.recorder.active

    @property
    def kind(self) -> tuple[bool, frozenset[str]]:
        """What decides which operations a step has: whether it is sampled, linears that are out of FP8."""
        return self.sampled, frozenset() if self.guard is None else frozenset(self.guard.locked)

    def before_step(self, step: int) -> None:
        """Apply what the guard decided, and let linears back into FP8 whose time is over, before ``step``
        (1-based) begins."""
        if self.guard is None:
            return
        back = self.guard.release(step)
        self._apply_guard()
        if self.scales is not None:  # what comes back has a history of other days
            self.scales.forget([*self.guard.current, *back], keep=WEIGHT_USE)

    def cast_rows(self) -> dict[str, dict[str, float]]:
        """Cast statistics of the last sampled step, of the whole model: ``{site: {field: value}}``; waits for
        the device. Collective over the pipeline's ranks. Of a tensor that other data-, tensor- or
        context-parallel ranks hold parts of, they are those of this rank's part."""
        assert self.recorder is not None
        return self.recorder.collect(self._rows(self.recorder))

    def _rows(self, recorder: CastRecorder) -> Tensor:
        if self.pipeline is None:
            return recorder.rows
        return self.pipeline.combine_rows(recorder.rows, recorder.recorded())

    def watch(self, done: int) -> list[Flag]:
        """Show the guard the statistics of step ``done`` (1-based), which was sampled; nothing without a
        guard. Collective over all ranks; waits for the device."""
        if self.guard is None:
            return []
        assert self.recorder is not None
        table = agreed_readings(self.recorder.sites, self._rows(self.recorder), self.processes.everyone)
        return self.guard.observe(done, table)

    def suspects(self, done: int, seen: Measured) -> bool:
        """Whether step ``done`` (1-based) looks wrong: not finite, or a spike. The same on all ranks."""
        if not seen.finite:
            return seen.num_targets > 0
        spikes = self.spikes
        return spikes is not None and (
            spikes.judge(done, loss=seen.loss, grad_norm=seen.grad_norm) is not None
        )

    def state(self) -> dict[str, Any]:
        """Host state of the monitors for a checkpoint."""
        found: dict[str, Any] = {"rewinds": self.rewinds}
        if self.guard is not None:
            found["guard"] = self.guard.state()
        if self.spikes is not None:
            found["spikes"] = self.spikes.state()
        return found

    def load_state(self, meta: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's host state, of any run."""
        self.rewinds = meta.get("rewinds", 0)
        if self.guard is not None and "guard" in meta:
            self.guard.load_state(meta["guard"])
            self._apply_guard()
        if self.spikes is not None and "spikes" in meta:
            self.spikes.load_state(meta["spikes"])

    def rewound(self, *, rewinds: int, actions: int, pinned: Mapping[str, int]) -> None:
        """Keep, after :meth:`load_state`, what led back to that checkpoint: how often that was, and for the
        guard its count of actions and the linears that stay out of FP8."""
        self.rewinds = max(self.rewinds, rewinds)
        if self.guard is not None:
            self.guard.rewound(pinned, actions)

    def _apply_guard(self) -> None:
        assert self.guard is not None
        if self._applied == self.guard.locked:
            return
        self._applied = dict(self.guard.locked)
        for path, linear in self.built.model.linears().items():
            linear.leaves_fp8 = path in self.guard.locked
        if self.recorder is not None:  # what is not cast must not be logged as if it were
            self.recorder.forget(
                f"{path}/{operand}" for path in self.guard.locked for operand in ("x", "grad_output")
            )

    def guard_metrics(self) -> dict[str, float]:
        """How many linears are out of FP8, and how often the guard acted; nothing without a guard."""
        if self.guard is None:
            return {}
        found = {"fp8/guarded_linears": len(self.guard.locked), "fp8/guard_actions": self.guard.actions}
        return {name: float(count) for name, count in found.items()}

    def optimizer_metrics(self, optimizer: Optimizer) -> dict[str, float]:
        """Shares of optimizer states that the last applied step flushed to zero, if it was sampled; waits for
        the device. Collective over the pipeline's ranks."""
        shares, elements = optimizer.statistics(), optimizer.states.num_elements(in_plan_only=True)
        if self.processes.pp.size > 1:
            shares = self._shares_of_all_stages(optimizer, shares, elements)
        return {f"optim/{name.replace('/', '_')}": float(value) for name, value in shares.items()}

    def _shares_of_all_stages(
        self, optimizer: Optimizer, shares: dict[str, Tensor], elements: int
    ) -> dict[str, Tensor]:
        formats = optimizer.states.plan.formats()
        names = [f"flushed/{role}" for role, fmt in formats.items() if not fmt.is_exact]
        counts = torch.tensor(
            [*(float(shares.get(name, 0.0)) * elements for name in names), elements],
            dtype=torch.float64,
            device=self.processes.device,
        )
        self.processes.pp.all_reduce(counts, purpose="statistics")()
        return {name: count / counts[-1] for name, count in zip(names, counts[:-1], strict=True)}

    def attention_metrics(self) -> dict[str, float]:
        """``train/query_norm_max``: the largest spectral norm of a query head's projection in the model;
        waits for the device. Collective over all ranks."""
        with self.whole():
            norms = [block.attention.query_norms().max() for block in self.built.model.held_blocks()]
        largest = torch.stack(norms).max()
        self.processes.everyone.all_reduce(largest, purpose="statistics", op=torch.distributed.ReduceOp.MAX)()
        return {"train/query_norm_max": float(largest)}
