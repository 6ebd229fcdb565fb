"""Which setting is read under which others: the one table behind two promises.

*No explicit setting is ignored*: what a person wrote and nothing will read is refused, with the reason and
the remedy (:mod:`fp8train.config.inert`). *Presets may fill what is moot*: a level fills formats of gradients
that a person then stores in high precision, and that is no mistake. Some filled values describe another one
(a history belongs to delayed scales); where a person writes that one differently, presets leave the filled
one at its default, so that a printed configuration shows nothing that is not so (``left_out``).

A rule says "these keys are read where this holds". A key that several rules name is read where all hold; the
first that does not is told, so outer switches come first. Every other key is in :data:`ALWAYS`, and a test
compares both with the schema: a new key cannot be forgotten.

What depends on the world, the device or the data is no condition here: a file may be used on several.
Settings for an attempt that may come later (``checkpoint.verify`` of a run that is not resumed yet) count as
read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from fp8train.config.conditions import (
    UNKNOWN,
    AllOf,
    AnyOf,
    Condition,
    Is,
    IsNot,
    Look,
    Never,
    NotBelow,
    SeveralReplicas,
    Unless,
    Unmet,
)
from fp8train.config.nodes import Node
from fp8train.config.recipe_registry import STATIC_RECIPES
from fp8train.config.schema import Config
from fp8train.precision.gradients import FP8_GRADIENT_READS
from fp8train.precision.operand_cast import CAST_READS, FP4_READS
from fp8train.precision.problems import Reads
from fp8train.precision.state_formats import ROUNDED_STATES, STATE_READS
from fp8train.update_rules.registry import rules_that_read, rules_with_second_moment


class Rule(NamedTuple):
    """Keys that are read only where a condition holds.

    Attributes:
        keys: patterns over dotted keys, ``*`` for one name; a section stands for all below it.
        condition: when they are read.
        but: keys below them that the rule is not about.
        left_out: whether presets leave them at their defaults where it does not hold.
        hidden: whether a printed configuration leaves them out there, because they are many.
        neutral: values that ask for nothing but what happens anyway, so that they may be written; where a
            preset fills another one, a validator may even ask for them.
    """

    keys: tuple[str, ...]
    condition: Condition
    but: tuple[str, ...] = ()
    left_out: bool = False
    hidden: bool = False
    neutral: tuple[Any, ...] = ()

    def covers(self, path: Sequence[str]) -> bool:
        """Whether it is about this key, or all of this section."""
        section = ".".join((*path, ""))
        above = any(key.startswith(section) for key in self.but)
        return _matches(self.keys, path) and not above and not _matches(self.but, path)


_FP8_GEMMS = Is("precision.gemm.fp8", (True,))
_FP8_GRADIENTS = IsNot("precision.gradient.format", "high_precision", "e4m3")
_SECOND_MOMENT = Is("optimizer.name", rules_with_second_moment())
_REDUCE = "precision.gradient.fp8.reduce"
_UNIT_SCALE = Is("parametrization.kind", ("unit_scaling", "umup"))
_MOMENTS = ("precision.state.exp_avg.format", "precision.state.exp_avg_sq.format")
_OPERAND = "precision.gemm.*.*"
_STATE = "precision.state.*"


def _read_by_rule(setting: str) -> Condition:
    """The optimizer's rule has this hyper-parameter."""
    return Is("optimizer.name", rules_that_read(setting))


def _below(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _reads(section: str, reads: Sequence[Reads], *, left_out: bool = True) -> tuple[Rule, ...]:
    """The rules that a value of :mod:`fp8train.precision` has about its own fields."""
    return tuple(
        Rule(_below(section, *one.names), Is(f".{one.switch}", one.values), left_out=left_out)
        for one in reads
    )


RULES: tuple[Rule, ...] = (
    Rule(("model.rope_theta", "model.rope_scaling"), Is("model.positions", ("rope",))),
    # Other parametrisations have weights of unit variance.
    Rule(("model.init_std",), Is("parametrization.kind", ("standard",))),
    Rule(("data.packing",), Is("data.kind", ("sft",))),
    # Conversations have a mask of their own.
    Rule(("data.mask_end_of_document",), Is("data.kind", ("pretrain",))),
    Rule(("parametrization.tau",), Is("parametrization.residual", ("fixed",))),
    Rule(
        _below("parametrization", "residual_mult", "residual_attention_ratio"),
        Is("parametrization.residual", ("umup",)),
    ),
    Rule(_below("parametrization", "constraint", "attention_length"), _UNIT_SCALE),
    Rule(("parametrization.base_width",), Is("parametrization.kind", ("mus",))),
    # Gradients have unit scale already under the others.
    Rule(("parametrization.gradient_scale_exponent",), Is("parametrization.kind", ("standard", "mus"))),
    # Static recipes shape the model in BF16 too.
    Rule(("precision.recipe",), Unless("precision.recipe", STATIC_RECIPES, _FP8_GEMMS), hidden=True),
    Rule(
        _below("precision", "profile", "weights", "gemm", "state", "traffic", "guard", "gradient.format"),
        _FP8_GEMMS,
        but=("precision.gemm.fp8",),
        hidden=True,
        neutral=("compute", "high_precision", "fp32", "off"),
    ),
    Rule(
        _below("precision.gemm.grad_weight", "grad_output", "x"),
        Is("precision.gemm.grad_weight.fp8", (True,)),
        hidden=True,
    ),
    *_reads(_OPERAND, CAST_READS),
    *_reads(_OPERAND, FP4_READS, left_out=False),
    Rule(
        _below("precision.gemm", "output.*.hadamard", "grad_input.*.hadamard"),
        Never("it is built for the operands of grad_weight"),
    ),
    Rule(
        ("precision.gemm.fast_accumulation",),
        AllOf(
            (
                # Simulated operands are multiplied in high precision.
                IsNot("precision.gemm.output.x.format", "e2m1", "e4m3"),
                # Products of blocks are scaled one by one, and added in FP32.
                *(Is(f"precision.gemm.output.{use}.granularity", ("tensor", "row")) for use in "xw"),
            )
        ),
        left_out=True,
    ),
    # Beside FP4 that is simulated, the head stays in high precision.
    Rule(("precision.gemm.head",), IsNot("precision.gemm.output.x.format", "e2m1", "e4m3")),
    Rule(("precision.gemm.smooth_swiglu",), Is("model.activation", ("swiglu",))),
    Rule(
        _below("precision.gradient", "accumulate", "reduce"),
        AllOf(
            (
                IsNot("precision.compute", "fp64", "bf16"),  # keeps FP64 throughout
                # which adds everything in integers
                AnyOf(
                    (
                        Is("precision.gradient.format", ("high_precision",)),
                        IsNot(_REDUCE, "exact", "exchange"),
                    )
                ),
            )
        ),
    ),
    Rule(("precision.gradient.fp8",), AllOf((_FP8_GEMMS, _FP8_GRADIENTS)), hidden=True),
    Rule(("precision.gradient.fp8.accumulate",), IsNot(_REDUCE, "exact", "exchange")),
    Rule(("precision.gradient.fp8.block",), Is(_REDUCE, ("exchange", "bf16", "fp32"))),
    *_reads("precision.gradient.fp8", FP8_GRADIENT_READS),
    Rule(("precision.gradient.fp8.between_nodes",), IsNot("precision.gradient.fp8.node_size", None, 8)),
    Rule(("precision.gradient.fp8.mu_threshold",), Is("precision.gradient.fp8.mu_criterion", ("count",))),
    Rule(("precision.state.plan", "precision.state.exp_avg_sq"), _SECOND_MOMENT),
    Rule(
        ("precision.state.master.sqrt", "precision.state.exp_avg.sqrt"),
        Never("it halves the exponents of a second moment"),
    ),
    *_reads(_STATE, STATE_READS),
    Rule(
        ("precision.state.bounded_update",),
        AllOf(
            (_read_by_rule("bounded_update"), AnyOf(tuple(Is(moment, ROUNDED_STATES) for moment in _MOMENTS)))
        ),
        left_out=True,
        hidden=True,
    ),
    Rule(
        _below("precision.traffic", "activations", "grad_output", "grad_input", "output"),
        NotBelow("parallel.tp", 2, 2),
        neutral=("compute",),
    ),
    Rule(
        ("precision.traffic.weights",),
        AllOf((Is("parallel.zero", (1,)), SeveralReplicas(), Is("precision.weights", ("fp8",)))),
        neutral=("compute",),
    ),
    Rule(("precision.traffic.pipeline",), NotBelow("parallel.pp", 2, 2)),
    Rule(
        ("precision.guard",),
        IsNot("precision.guard.action", "off", "report"),
        but=("precision.guard.action",),
    ),
    Rule(
        _below("precision.guard", "lock", "budget", "total"),
        Is("precision.guard.action", ("bf16", "recover")),
    ),
    Rule(_below("spikes", "window", "threshold", "min_steps"), IsNot("spikes.action", "off", "warn")),
    Rule(("spikes.cooldown",), Is("spikes.action", ("warn",))),
    Rule(("spikes.data_window",), Is("spikes.action", ("rollback",))),
    Rule(
        ("spikes.max_rollbacks",),
        AnyOf((Is("spikes.action", ("rollback",)), Is("precision.guard.action", ("recover",)))),
    ),
    Rule(("parallel.pipeline",), NotBelow("parallel.pp", 2, 2)),
    Rule(
        ("parallel.zero",),
        AnyOf(
            (Is("engine", ("deepspeed",)), SeveralReplicas())
        ),  # which splits and offloads for one rank too
        neutral=("none",),
    ),
    Rule(
        ("parallel.zero_partition",),
        AllOf((Is("engine", ("native",)), Is("parallel.zero", (1,)), SeveralReplicas())),
    ),
    Rule(("deepspeed",), Is("engine", ("deepspeed",)), hidden=True, neutral=("none",)),
    Rule(
        ("deepspeed.nvme_path",),
        AnyOf((Is("deepspeed.offload_param", ("nvme",)), Is("optimizer.offload", ("nvme",)))),
    ),
    Rule(("kernels.gemm", "kernels.quantize"), _FP8_GEMMS, neutral=("auto",)),
    Rule(("optimizer.eps",), _read_by_rule("eps")),
    Rule(("optimizer.decay_rule",), IsNot("optimizer.weight_decay", 0, 0.1)),
    Rule(("schedule.decay_fraction",), Is("schedule.kind", ("wsd",))),
    Rule(("schedule.min_lr_ratio",), IsNot("schedule.kind", "constant", "cosine")),
    Rule(("train.eval_batches",), NotBelow("train.eval_interval", 1, 100)),
    # With a save at the end alone there is none of another step, and none that training could go on after.
    Rule(
        _below("checkpoint", "keep_every", "keep_best", "asynchronous", "on_failure"),
        NotBelow("checkpoint.interval", 1, 100),
    ),
    Rule(("checkpoint.keep_best",), NotBelow("train.eval_interval", 1, 100)),
    Rule(("checkpoint.init_mode",), IsNot("checkpoint.init_from", None, "PATH")),
    Rule(_below("profile", "stop", "ranks", "memory"), IsNot("profile.start", None, 10)),
    Rule(_below("logging.wandb", "project", "entity"), IsNot("logging.wandb.mode", "off", "offline")),
    Rule(
        _below("watchdog", "stopped_timeout_s", "interval_s", "stacks"),
        IsNot("watchdog.enabled", False, True),
    ),
)

ALWAYS: tuple[str, ...] = (
    "run",
    *_below("model", "family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"),
    *_below("model", "ffn_hidden_size", "vocab_size", "vocab_multiple", "max_seq_len", "positions", "norm"),
    *_below("model", "norm_eps", "norm_gain", "norm_placement", "qk_norm", "attention_in_fp32"),
    *_below("model", "activation", "bias", "tie_embeddings"),
    *_below("data", "prefix", "blend", "valid_prefix", "split", "seq_length", "tokenizer", "shuffle_seed"),
    *_below("data", "kind"),
    *_below("parametrization", "kind", "residual", "attention_mult", "activation_mult", "loss_mult"),
    *_below("precision", "level", "compute", "activations", "gemm.fp8", "gradient.bucket_mib"),
    *_below("parallel", "dp", "tp", "cp", "pp"),
    *_below("optimizer", "name", "lr", "beta1", "beta2", "weight_decay", "clip_grad_norm", "offload"),
    *_below("schedule", "kind", "warmup_steps", "warmup_fraction"),
    *_below("train", "steps", "tokens", "global_batch_size", "batch_size_ramp", "micro_batch_size"),
    *_below("train", "activation_checkpointing", "compile", "consistency_interval", "eval_interval"),
    *_below("train", "gradient_release", "max_skipped_steps"),
    *_below("spikes", "action", "rerun"),
    *("engine", "kernels.attention", "kernels.norm", "kernels.optimizer", "kernels.multi_tensor"),
    *_below("checkpoint", "interval", "save_at_end", "keep_last", "verify", "resume", "accept_changes"),
    *_below("checkpoint", "reshard", "init_from", "visibility_timeout_s"),
    "profile.start",
    *_below("logging", "interval", "tensorboard", "wandb.mode", "cast_statistics_interval"),
    *_below("watchdog", "enabled", "startup_timeout_s", "step_timeout_s", "save_timeout_s"),
    "debug",
)
"""Keys that every run reads, or may read in a later attempt or on another machine."""


def _matches(patterns: Sequence[str], path: Sequence[str]) -> bool:
    for pattern in patterns:
        names = pattern.split(".")
        if len(names) <= len(path) and all(map(fnmatchcase, path, names)):
            return True
    return False


@cache
def rules_of(path: tuple[str, ...]) -> tuple[Rule, ...]:
    """The rules about a key, outer switches first."""
    return tuple(rule for rule in RULES if rule.covers(path))


def is_neutral(path: tuple[str, ...], value: Any) -> bool:
    """Whether the value asks for nothing but what happens anyway where nothing reads the setting."""
    return any(value in rule.neutral for rule in rules_of(path))


def why_unread(path: tuple[str, ...], look: Look) -> Unmet | None:
    """Why nothing reads the setting at ``path`` beside the others, or None."""
    return AllOf(tuple(rule.condition for rule in rules_of(path))).unmet(look, ".".join(path[:-1]))


def why_hidden(path: tuple[str, ...], look: Look) -> Unmet | None:
    """Why a printed configuration leaves the setting or section at ``path`` out, or None."""
    conditions = tuple(rule.condition for rule in rules_of(path) if rule.hidden)
    return AllOf(conditions).unmet(look, ".".join(path[:-1]))


def always_read(path: Sequence[str]) -> bool:
    """Whether the key is one that every run may read."""
    return _matches(ALWAYS, path)


@cache
def schema_defaults() -> dict[str, Any]:
    """Plain default of every key that has one; keys of a section that is absent by default have none."""
    found: dict[str, Any] = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            key, below = f"{prefix}{name}", _section(field.annotation)
            if below is not None and field.default is not None:
                walk(below, f"{key}.")
            if not field.is_required() and (below is None or field.default is None):
                found[key] = json.loads(json.dumps(field.default))

    walk(Config, "")
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, also an optional one."""
    for choice in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            # Lists of sections are values: their arguments are no type of a field.
            return choice if annotation is choice or type(None) in annotation.__args__ else None
    return None


def look_in(tree: Node) -> Look:
    """The values of a tree, with the schema's defaults."""

    def look(key: str) -> Any:
        node = tree.find(key.split("."))
        return schema_defaults().get(key, UNKNOWN) if node is None else node.plain()

    return look


def look_at(values: Mapping[str, Any]) -> Look:
    """The values of a configuration that is finished, as nested plain ones. What they do not know, because an
    older version wrote them, has the schema's default."""

    def look(key: str) -> Any:
        value: Any = values
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return schema_defaults().get(key, UNKNOWN)
            value = value[name]
        return value

    return look


def without_what_is_moot(tree: Node) -> Node:
    """``tree`` without the values that presets filled and that describe what is not so."""
    look = look_in(tree)

    def pruned(node: Node, path: tuple[str, ...]) -> Node:
        if not isinstance(node.value, dict):
            return node
        children = {
            name: pruned(child, (*path, name))
            for name, child in node.value.items()
            if not (child.origin.kind == "preset" and _left_out((*path, name), look))
        }
        return Node(children, node.origin, 1 + sum(child.size for child in children.values()))

    return pruned(tree, ())


def _left_out(path: tuple[str, ...], look: Look) -> bool:
    section = ".".join(path[:-1])
    return any(rule.left_out and rule.condition.unmet(look, section) for rule in rules_of(path))
