"""What differs between the configuration that wrote a checkpoint and the one that reads it, and what that
means.

Three kinds. *Free*: where and how fast the same training runs: layout, devices, buckets, logging. *Meaning*:
the training itself: formats, optimizer, schedule, length, batch; a user may want that, but must say so.
*Refused*: the stored numbers would be those of another model. Data is in none of them: its fingerprint
decides, for the same samples may lie elsewhere.

A setting that neither run reads (:mod:`fp8train.config.ownership`) is no difference, whatever stands there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from fp8train.config.batch_sizes import BatchSizes
from fp8train.config.errors import ConfigError
from fp8train.config.ownership import look_at, why_unread
from fp8train.config.schema import Config, to_plain
from fp8train.config.stored import as_now

Kind = Literal["free", "meaning", "refused"]

NOT_COMPARED = (
    *("run.name", "run.dir", "run.overwrite", "run.time_limit_minutes"),
    *("checkpoint", "logging", "watchdog", "debug", "profile"),
)
"""Sections and keys about this attempt, not about the run."""
FREE = (
    *("run.device", "run.threads", "run.deterministic", "run.cuda_graphs"),
    *("engine", "kernels", "deepspeed", "parallel"),
    "model.init_std",
    *(f"data.{key}" for key in ("prefix", "blend", "valid_prefix", "split", "tokenizer", "shuffle_seed")),
    *("train.micro_batch_size", "train.activation_checkpointing", "train.compile", "train.gradient_release"),
    *("train.consistency_interval", "train.eval_interval", "train.eval_batches", "optimizer.offload"),
    *("precision.gradient.bucket_mib", "precision.gradient.fp8.node_size", "precision.guard"),
    *("train.max_skipped_steps", "spikes"),
    "precision.gemm.fast_accumulation",  # of a device's kernel; runs that began before it was the default
)
REFUSED = ("model", "parametrization", "optimizer.name", "data.seq_length")
"""But for what is in :data:`FREE`."""
_SHOWN = 6


@dataclass(frozen=True)
class Change:
    """One setting that is not what it was. Values are plain (JSON)."""

    key: str
    before: Any
    now: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.before)} -> {_text(self.now)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def is_in(key: str, names: Sequence[str]) -> bool:
    """Whether ``key`` is one of ``names`` or lies in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def changes(saved: Mapping[str, Any], now: Config) -> list[Change]:
    """Every setting that differs, in the schema's order.

    Args:
        saved: a configuration as nested plain values. What it does not know had its default; what has none
            is not compared.
        now: of this run.
    """
    found, plain = [], to_plain(now)
    saved = as_now(saved)
    looks = look_at(saved), look_at(plain)
    for key, before, value in _differing(Config, saved, plain, ""):
        if is_in(key, NOT_COMPARED) or (
            key in ("train.steps", "train.tokens") and _steps(saved) == now.total_steps
        ):
            continue
        if all(why_unread(tuple(key.split(".")), look) is not None for look in looks):
            continue
        found.append(Change(key, before, value, _kind(key, now)))
    return found


def _kind(key: str, now: Config) -> Kind:
    if is_in(key, FREE):
        return "free"
    # Factors of these parametrisations depend on the batch.
    in_model = key == "train.global_batch_size" and now.parametrization.kind in ("unit_scaling", "umup")
    return "refused" if in_model or is_in(key, REFUSED) else "meaning"


def _differing(
    section: type[BaseModel], saved: Mapping[str, Any], now: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Any, Any]]:
    for name, field in section.model_fields.items():
        below, key, value = field.annotation, f"{path}{name}", now[name]
        if isinstance(below, type) and issubclass(below, BaseModel):
            yield from _differing(below, saved.get(name) or {}, value, f"{key}.")
        elif name in saved or not field.is_required():
            before = saved[name] if name in saved else json.loads(json.dumps(field.default))
            if before != value:
                yield key, before, value


def _steps(saved: Mapping[str, Any]) -> int | None:
    """Optimizer steps of the whole run as it was planned; None where it is not said."""
    train, data = saved.get("train", {}), saved.get("data", {})
    if train.get("steps") is not None:
        return int(train["steps"])
    if train.get("tokens") is None:
        return None
    ramp = [(stage["steps"], stage["global_batch_size"]) for stage in train.get("batch_size_ramp", ())]
    return BatchSizes(train["global_batch_size"], ramp).steps_for(train["tokens"], data["seq_length"])


def check_accepted(found: Sequence[Change], accepted: Sequence[str], place: str) -> None:
    """Whether a run may go on with these changes.

    Args:
        found: from :func:`changes`.
        accepted: ``checkpoint.accept_changes``.
        place: the checkpoint, for messages.

    Raises:
        ConfigError: a refused change, or one of meaning that is not accepted; lists them and says how to
            accept.
    """
    refused = [change for change in found if change.kind == "refused"]
    if refused:
        raise ConfigError(
            f"checkpoint {place} holds another model (saved -> now): {listed(refused)}\n"
            "restore these settings, or start a new run under another run.name"
        )
    open_ = [c for c in found if c.kind == "meaning" and not is_in(c.key, accepted)]
    if open_:
        names = list(dict.fromkeys([*accepted, *(_to_accept(change.key) for change in open_)]))
        raise ConfigError(
            f"checkpoint {place} was trained with other settings (saved -> now): {listed(open_)}\n"
            "restore them, or say that the run shall go on with the new ones:\n"
            f"  'checkpoint.accept_changes=[{', '.join(names)}]'"
        )


def _to_accept(key: str) -> str:
    """How to name a change: many keys of ``precision`` follow from its level or recipe."""
    section = key.partition(".")[0]
    return section if section in ("precision", "schedule") else key


def listed(found: Sequence[Change]) -> str:
    """The changes on one line, those that others follow from first."""
    first = ("precision.level", "precision.recipe", "precision.profile", "precision.state.plan")
    ordered = sorted(found, key=lambda change: (change.key.count(".") > 1, change.key not in first))
    shown = "; ".join(str(change) for change in ordered[:_SHOWN])
    return f"{shown}; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else shown
