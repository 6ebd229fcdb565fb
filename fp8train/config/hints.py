"""Guesses what the user meant, for error messages: nearest keys, legal values, and how to write a value of
the right type."""

from __future__ import annotations

import difflib
import math
from typing import Any

from fp8train.config.keys import Fragment, KeyTable
from fp8train.config.scalars import ScalarError, parse_plain, shorten

_ELSEWHERE: dict[str, str] = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "attention_heads": "model.num_heads",
    "batch_size": "train.global_batch_size",
    "block_size": "data.seq_length",
    "checkpoint_interval": "checkpoint.interval",
    "clip_grad": "optimizer.clip_grad_norm",
    "context_length": "data.seq_length",
    "d_ff": "model.ffn_hidden_size",
    "d_model": "model.hidden_size",
    "data_parallel_size": "parallel.dp",
    "data_path": "data.prefix",
    "dtype": "precision.compute",
    "fp8": "precision.gemm.fp8",
    "fp8_recipe": "precision.recipe",
    "grad_clip": "optimizer.clip_grad_norm",
    "gradient_checkpointing": "train.activation_checkpointing",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "intermediate_size": "model.ffn_hidden_size",
    "learning_rate": "optimizer.lr",
    "log_interval": "logging.interval",
    "max_lr": "optimizer.lr",
    "max_position_embeddings": "model.max_seq_len",
    "max_steps": "train.steps",
    "min_lr": "schedule.min_lr_ratio",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_heads",
    "n_heads": "model.num_heads",
    "n_kv_heads": "model.num_kv_heads",
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_kv_heads",
    "num_query_groups": "model.num_kv_heads",
    "output_dir": "run.dir",
    "rms_norm_eps": "model.norm_eps",
    "rope_base": "model.rope_theta",
    "save_interval": "checkpoint.interval",
    "sequence_length": "data.seq_length",
    "seq_len": "data.seq_length",
    "train_iters": "train.steps",
    "train_steps": "train.steps",
    "train_tokens": "train.tokens",
    "warmup": "schedule.warmup_steps",
}
"""What other frameworks call our keys; used in messages only."""

_YES = {"yes", "on", "y", "true"}
_NO = {"no", "off", "n", "false"}


def suggest_key(table: KeyTable, path: tuple[str | int, ...]) -> str:
    """The end of an "unknown key" message: the nearest known key, or the keys that the section has."""
    *section, name = (str(step) for step in path)
    if name in table.keys and "." in name:
        head, _, tail = name.rpartition(".")
        return f"write it nested, key {tail} under section {head}"
    siblings = {key.path[-1]: key.name for key in table.children(section)}
    elsewhere = {key.path[-1]: key.name for key in reversed(table.keys.values())}
    known = {full: full for full in table.keys}
    whole = ".".join((*section, name))
    for candidates, wanted, cutoff in (
        (siblings, name, 0.7),
        (_ELSEWHERE, name, 1.0),
        (elsewhere, name, 1.0),
        (known, whole, 0.85),
        (_ELSEWHERE, name, 0.8),
        (elsewhere, name, 0.8),
        (siblings, name, 0.5),
    ):
        if match := difflib.get_close_matches(wanted, candidates, n=1, cutoff=cutoff):
            return f"did you mean {candidates[match[0]]}?"
    if section and siblings:
        return f"{'.'.join(section)} has {', '.join(siblings)}"
    return f"sections are {', '.join(key.name for key in table.children(()))}"


def show(value: Any) -> str:
    """``value`` as it would be written in YAML, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return shorten(ascii(value), 60)
    if isinstance(value, (list, tuple)):
        return "a list" if len(value) > 6 else shorten(f"[{', '.join(map(show, value))}]", 60)
    if isinstance(value, dict):
        return "a mapping"
    return shorten(repr(value) if isinstance(value, int) else f"{value:g}")


def suggest_value(fragment: Fragment, value: Any) -> str:
    """How to write what was probably meant, as the end of a message; empty if nothing helps."""
    kinds = _kinds(fragment)
    if isinstance(value, str):
        return _suggest_for_text(fragment, kinds, value)
    if value is None:
        return "; give a value or remove the line"
    if isinstance(value, float) and not math.isfinite(value):
        return "; it must be finite"
    if isinstance(value, float) and kinds & {"integer"} and value.is_integer() and abs(value) < 2**63:
        return f"; write {int(value)}"
    if kinds == {"string"} and isinstance(value, (bool, int, float)):
        return f'; write "{show(value)}" in quotes'
    if kinds == {"array"} and not isinstance(value, (list, tuple)):
        return "; write it in brackets: [...]"
    return ""


def _suggest_for_text(fragment: Fragment, kinds: set[str], text: str) -> str:
    lowered = text.lower()
    if "boolean" in kinds and lowered in _YES | _NO:
        return f"; write {'true' if lowered in _YES else 'false'} without quotes"
    spellings = {str(choice).lower(): str(choice) for choice in _choices(fragment)}
    if match := difflib.get_close_matches(lowered, spellings, n=1, cutoff=0.5):
        return f"; did you mean {spellings[match[0]]}?"
    if kinds & {"integer", "number"}:
        if lowered in _YES | _NO:
            return f"; {lowered} is text, not a number"
        number = _number(text)
        if number is not None:
            return f"; write {show(number)} without quotes or separators"
    if kinds == {"array"}:
        return "; write it in brackets: [...]"
    return ""


def _number(text: str) -> int | float | None:
    """The number that ``text`` was meant to be, or None."""
    try:
        value = parse_plain(text.replace("_", "").replace(",", "").strip())
    except ScalarError:
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _kinds(fragment: Fragment) -> set[str]:
    if "anyOf" in fragment:
        return set().union(*(_kinds(choice) for choice in fragment["anyOf"]))
    return {fragment["type"]} if "type" in fragment else set()


def _choices(fragment: Fragment) -> list[Any]:
    if "anyOf" in fragment:
        return [choice for branch in fragment["anyOf"] for choice in _choices(branch)]
    return [fragment["const"]] if "const" in fragment else list(fragment.get("enum", ()))
