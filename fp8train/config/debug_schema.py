"""The ``debug`` section: faults on purpose, to see what a run makes of them. Never in a run that counts.

See :mod:`fp8train.training.faults` for when they strike, :mod:`fp8train.training.strikes` for what they do.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fp8train.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, contradiction

FaultKind = Literal[
    "exception",
    "exit",
    "sigterm",
    "sigint",
    "sigkill",
    "sigstop",
    "segfault",
    "hang",
    "sleep",
    "gil",
    "slow",
    "oom_host",
    "disk_full",
    "nan_loss",
    "nan_gradient",
    "outlier_channel",
    "bit_flip_gradient",
    "bit_flip_weight",
]
FaultPhase = Literal[
    "build",
    "restore",
    "data",
    "forward",
    "backward",
    "reduce",
    "optimizer",
    "report",
    "evaluate",
    "agree",
    "save",
    "end",
    "save_begin",
    "save_data",
    "save_manifest",
    "save_rename",
    "save_pointer",
    "save_retention",
]
"""Phases of a step (:mod:`fp8train.comm.progress`) and moments of a save (``SavePhase`` of
:mod:`fp8train.checkpoint.save`)."""

BEFORE_STEPS = ("build", "restore")
OF_RANK_0 = ("save_manifest", "save_rename", "save_pointer", "save_retention")
IN_FORWARD = ("nan_loss", "nan_gradient", "outlier_channel", "bit_flip_gradient")
"""Kinds that lie in a forward pass and the backward pass that follows it."""

_READ_BY: dict[str, tuple[str, ...]] = {
    "seconds": ("sleep", "gil", "slow"),
    "steps": ("slow", "disk_full", *IN_FORWARD),
    "name": ("nan_gradient", "outlier_channel", "bit_flip_gradient", "bit_flip_weight"),
    "channel": ("outlier_channel",),
    "factor": ("outlier_channel",),
    "element": ("bit_flip_gradient", "bit_flip_weight"),
    "bit": ("bit_flip_gradient", "bit_flip_weight"),
    "status": ("exit",),
}
_REQUIRED = ("seconds", "name")


class FaultConfig(Section):
    """One fault: what happens, on which rank, when."""

    kind: FaultKind = Field(examples=["sigkill"])
    """What happens. ``exit``: the process ends at once, without a word. ``hang``: it sleeps for ever; ``gil``
    sleeps ``seconds`` without letting another thread run; ``slow`` sleeps ``seconds`` in this phase of each
    step. ``oom_host``: an allocation that fails. ``disk_full``: fills the disk of the run directory, which
    must be a small one. ``nan_gradient``, ``outlier_channel``, ``bit_flip_gradient``: in what the module
    ``name`` puts out, or in its gradient."""
    step: NonNegativeInt = Field(examples=[3])
    """The step in which it happens, as the log counts: the first is 1, and a save in step 3 is that of
    checkpoint 3. 0: before the first step, for ``phase`` ``build`` and ``restore``."""
    rank: NonNegativeInt | Literal["all"] = 0
    """The rank that it happens to."""
    phase: FaultPhase = "forward"
    """When in the step: as a phase begins, or at a moment of a save."""
    every_start: bool = False
    """Also when the run is started again. Else it happens once for each rank of a run directory."""
    seconds: PositiveFloat | None = None
    """Of ``sleep``, ``gil`` and ``slow``, which need it."""
    steps: PositiveInt | None = None
    """For how many steps ``disk_full`` and kinds in the forward pass last, by default 1; ``slow`` by default
    lasts to the end."""
    name: str | None = None
    """The module whose output is changed (``layers.0.mlp.down``, ``final_norm``); for ``bit_flip_weight`` the
    tensor: a weight as the model reads it (``layers.0.mlp.down.weight``), or one of the checkpoint
    (``master/...``, ``exp_avg/...``)."""
    channel: NonNegativeInt | None = None
    """Index into the last dimension; default 0."""
    factor: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """What the channel is multiplied by; default 1000."""
    element: NonNegativeInt | None = None
    """Index into the flattened tensor; default 0."""
    bit: NonNegativeInt | None = None
    """Which bit of the element, from the lowest; default 0."""
    status: Annotated[int, Field(ge=0, le=255)] | None = None
    """Exit status of ``exit``; default 1."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> FaultConfig:
        for name, kinds in _READ_BY.items():
            given = getattr(self, name) is not None
            if given and self.kind not in kinds:
                raise contradiction(
                    f"{name} is of kind {_one_of(kinds)}, but kind is {self.kind}; remove {name}",
                    name,
                    "kind",
                )
            if not given and name in _REQUIRED and self.kind in kinds:
                raise contradiction(f"kind: {self.kind} needs {name}; add it", "kind")
        if (self.step == 0) != (self.phase in BEFORE_STEPS):
            raise contradiction(
                f"phase: {self.phase} "
                + (
                    "comes before the first step; write step: 0"
                    if self.step
                    else "is one of a step; the first is 1"
                ),
                "step",
                "phase",
            )
        if self.kind in IN_FORWARD and self.phase != "forward":
            raise contradiction(
                f"kind: {self.kind} lies in a forward pass, but phase is {self.phase}; remove phase",
                "phase",
                "kind",
            )
        if self.kind == "bit_flip_weight" and self.phase in BEFORE_STEPS:
            raise contradiction(
                f"kind: bit_flip_weight needs a model, which there is not in phase: {self.phase}; write "
                "step: 1 and phase: data",
                "phase",
                "kind",
            )
        if self.phase in OF_RANK_0 and self.rank not in (0, "all"):
            raise contradiction(
                f"phase: {self.phase} is of rank 0 alone, but rank is {self.rank}; write rank: 0",
                "rank",
                "phase",
            )
        return self

    @property
    def last_step(self) -> float:
        """The last step of a fault that lasts."""
        return (
            float("inf") if self.kind == "slow" and self.steps is None else self.step + (self.steps or 1) - 1
        )

    def __str__(self) -> str:
        where = f"rank {self.rank}" if self.rank != "all" else "all ranks"
        return f"{self.kind} at {where}, step {self.step}, {self.phase}"


def _one_of(kinds: tuple[str, ...]) -> str:
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"


class DebugConfig(Section):
    """For tests of the framework itself; never in a run that counts."""

    fault_injection: tuple[FaultConfig, ...] = Field(default=(), strict=False)
    """Faults that happen on purpose. The run says so at its start and whenever one strikes."""
