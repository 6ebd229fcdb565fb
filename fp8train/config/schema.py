"""What a run can be told: the frozen pydantic models behind the YAML file.

One class per section (``{section}_schema.py``; small ones are in
``all_sections.py``), one field per key; the field's
description is the documentation (``fp8train config --schema`` exports it for editors). Values are strict: a
number is never read from a string, a bool is never an int, an unknown key is an error. Fields whose default
depends on another field (``model.norm`` on ``model.family``, ``precision.gemm`` on ``precision.level``) are
*filled by presets before validation* (see :mod:`fp8train.config.presets`), so that ``fp8train config`` can
tell where each value came from; a validated :class:`Config` therefore has no holes.

Cross-field rules that need only the file live here, as validators that name both keys. Rules that need the
world size or the data are checked where those are known.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError

from fp8train.config.all_sections import AllSections
from fp8train.config.debug_rules import fault_problems
from fp8train.config.engine_rules import engine_problems
from fp8train.config.kernel_rules import kernel_problems
from fp8train.config.layout import layout_problems
from fp8train.config.linear_names import exclusion_problems
from fp8train.config.optimizer_schema import MAX_DECAY_PER_STEP
from fp8train.config.recipe_registry import STATIC_RECIPES
from fp8train.config.section import contradiction, contradictions
from fp8train.config.te_rules import te_problems


class Config(AllSections):
    """The configuration of one run."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        """Every rule about several sections, so that all that is broken is told at once."""
        found = []
        for check in (
            self._accepted_changes_exist,
            self._parametrization,
            self._evaluation,
            self._keep_best,
            self._attention,
            self._kernels,
            self._cuda_graphs,
            self._saved_activations,
            self._guard,
            self._spikes,
            self._context,
            self._profile,
        ):
            try:
                check()
            except PydanticCustomError as error:
                found.append(error)
        problems = [*exclusion_problems(self), *layout_problems(self), *engine_problems(self)]
        problems += [*te_problems(self), *kernel_problems(self), *fault_problems(self)]
        found += [contradiction(problem.message, *problem.keys) for problem in problems]
        if found:
            raise contradictions(found)
        return self

    def _accepted_changes_exist(self) -> None:
        for name in self.checkpoint.accept_changes:
            if not _is_key(name):
                raise contradiction(
                    f"checkpoint.accept_changes: {name} is neither a section nor a key; write for example "
                    "[precision, optimizer.lr]",
                    "checkpoint.accept_changes",
                )

    def _parametrization(self) -> None:
        kind, recipe = self.parametrization.kind, self.precision.recipe
        if kind != "standard" and self.model.tie_embeddings:
            raise contradiction(
                f"parametrization.kind: {kind} gives embedding and output head different multipliers and "
                "learning rates, so they cannot be one tensor; write model.tie_embeddings: false",
                "model.tie_embeddings",
                "parametrization.kind",
            )
        if recipe in STATIC_RECIPES and kind != recipe:
            raise contradiction(
                f"precision.recipe: {recipe} casts without scales, which fits the unit-variance tensors of "
                f"parametrization.kind: {recipe}, but kind is {kind}; remove one of the two, or choose a "
                "recipe that measures its scales, such as current",
                "parametrization.kind",
                "precision.recipe",
            )
        if kind in ("unit_scaling", "umup") and self.train.batch_size_ramp:
            raise contradiction(
                f"parametrization.kind: {kind} has factors that depend on the global batch size, so it "
                "cannot change during a run; remove train.batch_size_ramp",
                "train.batch_size_ramp",
                "parametrization.kind",
            )
        decay = self.optimizer.weight_decay
        if self.optimizer.decay_rule != "lr_times_lambda" and decay > MAX_DECAY_PER_STEP:
            raise contradiction(
                f"optimizer.weight_decay: {decay:g} with decay_rule: {self.optimizer.decay_rule} removes "
                f"{decay:.0%} of every weight at every step; it is no longer multiplied by the learning "
                f"rate: write at most {MAX_DECAY_PER_STEP:g} (typical: 1e-4)",
                "optimizer.weight_decay",
                "optimizer.decay_rule",
            )

    def _evaluation(self) -> None:
        if self.train.eval_interval and self.data.split[1] == 0 and self.data.valid_prefix is None:
            raise contradiction(
                f"train.eval_interval is {self.train.eval_interval}, but there is no validation data; give "
                "data.split a validation share, set data.valid_prefix, or write train.eval_interval: 0",
                "train.eval_interval",
                "data.split",
            )

    def _keep_best(self) -> None:
        best, every, saved = self.checkpoint.keep_best, self.train.eval_interval, self.checkpoint.interval
        if best and every and saved and not (math.lcm(every, saved) < self.total_steps):
            raise contradiction(
                f"checkpoint.keep_best: {best}, but no step before the end ({self.total_steps}) is both "
                f"saved (checkpoint.interval: {saved}) and evaluated (train.eval_interval: {every}); make "
                "one a multiple of the other",
                "checkpoint.keep_best",
                "checkpoint.interval",
                "train.eval_interval",
            )

    def _attention(self) -> None:
        backend, compute = self.kernels.attention, self.precision.compute
        in_bf16 = compute == "bf16" and not self.model.attention_in_fp32
        if backend in ("auto", "math") or in_bf16:
            return
        key, value = (
            ("model.attention_in_fp32", "true") if compute == "bf16" else ("precision.compute", compute)
        )
        raise contradiction(
            f"kernels.attention: {backend} computes in BF16, but {key} is {value}; write "
            "kernels.attention: auto",
            "kernels.attention",
            key,
        )

    def _kernels(self) -> None:
        """Kernels of other packages are for CUDA devices, in BF16 or FP32."""
        kernels, found = self.kernels, []
        device, compute = self.run.device, self.precision.compute
        for name, value in kernels.model_dump().items():
            if value == "auto" or (name, value) == ("attention", "math"):
                continue
            key = f"kernels.{name}"
            if device == "cpu":
                found.append(
                    contradiction(
                        f"{key}: {value} is for CUDA devices, but run.device is cpu; write {key}: auto",
                        key,
                        "run.device",
                    )
                )
            if compute == "fp64" and name != "attention":
                found.append(
                    contradiction(
                        f"{key}: {value} knows no FP64, but precision.compute is fp64; write {key}: auto",
                        key,
                        "precision.compute",
                    )
                )
        if self.run.deterministic and kernels.attention == "cudnn":
            found.append(
                contradiction(
                    "kernels.attention: cudnn has a backward pass that is not deterministic, but "
                    "run.deterministic is true; write kernels.attention: auto, or run.deterministic: false",
                    "kernels.attention",
                    "run.deterministic",
                )
            )
        if found:
            raise contradictions(found)

    def _cuda_graphs(self) -> None:
        """What a graph of forward and backward cannot hold, or was never recorded with."""
        if not self.run.cuda_graphs:
            return
        gradient, parallel = self.precision.gradient, self.parallel
        exact = gradient.format != "high_precision" and gradient.fp8.reduce == "exact"
        problems = (
            (self.train.compile != "off", "train.compile", self.train.compile, "off", "is not recorded yet"),
            (parallel.tp > 1, "parallel.tp", parallel.tp, 1, "communicates within blocks"),
            (parallel.cp > 1, "parallel.cp", parallel.cp, 1, "communicates within blocks"),
            (parallel.pp > 1, "parallel.pp", parallel.pp, 1, "communicates between blocks"),
            (exact, "precision.gradient.fp8.reduce", "exact", "exchange", "makes new grids for each step"),
        )
        found = [
            contradiction(
                f"run.cuda_graphs: true records forward and backward of one process, but {key}: {value} "
                f"{reason}; write {key}: {remedy}, or run.cuda_graphs: false",
                "run.cuda_graphs",
                key,
            )
            for holds, key, value, remedy, reason in problems
            if holds
        ]
        if found:
            raise contradictions(found)

    def _saved_activations(self) -> None:
        if self.precision.activations == "compute":
            return
        for key, value, off in (
            ("activation_checkpointing", self.train.activation_checkpointing, "none"),
            ("compile", self.train.compile, "off"),
        ):
            if value != off:
                reason = (
                    "computes again what would be kept" if off == "none" else "decides itself what to keep"
                )
                raise contradiction(
                    "precision.activations: fp8 keeps FP8 inputs of norms and non-linearities, but "
                    f"train.{key}: {value} {reason}; write train.{key}: {off}, or precision.activations: "
                    "compute",
                    "precision.activations",
                    f"train.{key}",
                )

    def _guard(self) -> None:
        guard = self.precision.guard
        if guard.action == "off":
            return
        if self.logging.cast_statistics_interval == 0:
            raise contradiction(
                f"precision.guard.action: {guard.action} reads cast statistics, but "
                "logging.cast_statistics_interval is 0; give it a number of steps",
                "logging.cast_statistics_interval",
                "precision.guard.action",
            )
        if guard.action in ("bf16", "recover") and self.train.compile != "off":
            raise contradiction(
                f"precision.guard.action: {guard.action} changes what a block computes while it runs, but "
                f"train.compile is {self.train.compile}; write train.compile: off, or guard.action: report",
                "precision.guard.action",
                "train.compile",
            )

    def _profile(self) -> None:
        start = self.profile.start
        if start is not None and start > self.total_steps:
            raise contradiction(
                f"profile.start: {start} is after the last step ({self.total_steps}); write one of them",
                "profile.start",
            )

    def _spikes(self) -> None:
        spikes, found = self.spikes, []
        if spikes.action == "rollback" and not self.checkpoint.interval:
            found.append(
                contradiction(
                    "spikes.action: rollback returns to a checkpoint, but checkpoint.interval: 0 saves none "
                    "before the end; write checkpoint.interval: 500, or spikes.action: skip",
                    "checkpoint.interval",
                    "spikes.action",
                )
            )
        if spikes.rerun and not self.run.deterministic:
            found.append(
                contradiction(
                    "spikes.rerun: true compares two runs of a step bit by bit, but run.deterministic is "
                    "false; write run.deterministic: true, or spikes.rerun: false",
                    "run.deterministic",
                    "spikes.rerun",
                )
            )
        if found:
            raise contradictions(found)

    def _context(self) -> None:
        if self.data.seq_length > self.model.max_seq_len:
            raise contradiction(
                f"data.seq_length ({self.data.seq_length}) is longer than "
                f"model.max_seq_len ({self.model.max_seq_len})",
                "data.seq_length",
                "model.max_seq_len",
            )


def _is_key(name: str) -> bool:
    """Whether there is a section or key of this dotted name."""
    section: Any = Config
    for part in name.split("."):
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            return False
        section = fields[part].annotation
    return True


def to_plain(section: BaseModel) -> dict[str, Any]:
    """The section as nested dicts, lists and scalars, ready for YAML or JSON."""
    return section.model_dump(mode="json")
