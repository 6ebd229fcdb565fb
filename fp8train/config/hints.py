"""Guesses what the user meant, for error messages: nearest keys, legal values, and how to write a value of
the right type."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fp8train.config.keys import Fragment, KeyTable
from fp8train.config.scalars import ScalarError, parse_plain, shorten

_ELSEWHERE: dict[str, str] = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "attention_backend": "kernels.attention",
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
    "warmup_iters": "schedule.warmup_steps",
}
"""What other frameworks call our keys; used in messages only."""

_SAME_MEANING: dict[str, str] = {
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "double": "fp64",
    "gpt2": "gpt",
    "layer_norm": "layernorm",
    "rms_norm": "rmsnorm",
    "rotary": "rope",
    "warmup_stable_decay": "wsd",
}
"""What others call our values."""

_YES = {"yes", "on", "y", "true"}
_NO = {"no", "off", "n", "false"}


def close_match(word: str, candidates: Iterable[str], *, cutoff: float) -> str | None:
    """The candidate that ``word`` is a misspelling of, if there is one.

    Similar means: a :mod:`difflib` ratio of at least ``cutoff``, or the same letters in another order. Words
    that differ in their digits only (``O7`` and ``O3``, ``fp16`` and ``fp8``) are different names, not typos.
    """
    similar = [name for name in candidates if name == word or _letters(name) != _letters(word)]
    if match := difflib.get_close_matches(word, similar, n=1, cutoff=cutoff):
        return match[0]
    jumbled = [name for name in similar if len(word) > 2 and Counter(name) == Counter(word)]
    return jumbled[0] if len(jumbled) == 1 else None


def _letters(word: str) -> str:
    return re.sub(r"[0-9]", "", word.lower()) if re.search(r"[0-9]", word) else f"{word} has no digits"


def meant_key(table: KeyTable, path: tuple[str | int, ...]) -> str | None:
    """The known key that an unknown one probably stands for; None where none is close."""
    *section, name = (str(step) for step in path)
    siblings = {key.path[-1]: key.name for key in table.children(section)}
    counts = Counter(key.path[-1] for key in table.keys.values())
    elsewhere = {key.path[-1]: key.name for key in table.keys.values() if counts[key.path[-1]] == 1}
    known = {} if siblings else {full: full for full in table.keys}
    attempts: tuple[tuple[Mapping[str, str], str, float], ...] = (
        (siblings, name, 0.7),
        (_ELSEWHERE, name, 1.0),
        (elsewhere, name, 1.0),
        (known, ".".join((*section, name)), 0.85),
        (_ELSEWHERE, name, 0.8 if len(name) > 3 else 1.0),
        (elsewhere, name, 0.8 if len(name) > 3 else 1.0),
    )
    for candidates, wanted, cutoff in attempts:
        if match := close_match(wanted, candidates, cutoff=cutoff):
            return candidates[match]
    return None


def suggest_key(table: KeyTable, path: tuple[str | int, ...]) -> str:
    """The end of an "unknown key" message: the nearest known key, or the keys that the section has."""
    *section, name = (str(step) for step in path)
    if name in table.keys and "." in name:
        head, _, tail = name.rpartition(".")
        return f"write it nested, key {tail} under section {head}"
    if meant := meant_key(table, path):
        return f"did you mean {meant}?"
    siblings = [key.path[-1] for key in table.children(section)]
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
    if isinstance(value, int):
        return shorten(repr(value))
    text = f"{value:g}"
    return text if not text.lstrip("-").isdigit() else f"{text}.0"  # what a whole number is not


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
        choices = [str(choice) for choice in _choices(fragment)]
        if not choices or show(value) in choices:
            return f'; write "{show(value)}" in quotes'
        ending = [choice for choice in choices if choice.endswith(show(value))]
        return f"; did you mean {ending[0]}?" if len(ending) == 1 else ""
    if kinds == {"array"} and not isinstance(value, (list, tuple)):
        return "; write it in brackets: [...]"
    return ""


def _suggest_for_text(fragment: Fragment, kinds: set[str], text: str) -> str:
    lowered = text.lower()
    if "boolean" in kinds and lowered in _YES | _NO:
        return f"; write {'true' if lowered in _YES else 'false'} without quotes"
    spellings = {str(choice).lower(): str(choice) for choice in _choices(fragment)}
    known = _SAME_MEANING.get(lowered, lowered)
    match = known if known in spellings else close_match(lowered, spellings, cutoff=0.8)
    if match is not None:
        return f"; did you mean {spellings[match]}?"
    if kinds & {"integer", "number"}:
        return _suggest_number(kinds, text)
    if kinds == {"array"}:
        return "; write it in brackets: [...]"
    return ""


_GROUPED = re.compile(r"[-+]?[0-9]{1,3}([_, '][0-9]{3})+")
"""A whole number whose thousands are set apart."""
_SEPARATED = re.compile(r"[-+]?[0-9]+(?P<sign>[_, '])[0-9][0-9_, ']*")


def _suggest_number(kinds: set[str], text: str) -> str:
    """How to write the number that ``text`` was meant to be.

    Only thousands in groups of three are read as separators: ``1,000`` is 1000, but ``1,5`` is not 15: it is
    1.5 where a fraction is legal, and anyone's guess where it is not.
    """
    text = text.strip()
    if text.lower() in _YES | _NO:
        return f"; {text.lower()} is text, not a number"
    grouped = _GROUPED.fullmatch(text) is not None and not text.lstrip("+-").startswith("0")
    plain = re.sub(r"[^-0-9]", "", text)
    separated = _SEPARATED.fullmatch(text)
    if separated and separated["sign"] == "," and text.count(",") == 1 and "number" in kinds:
        or_plain = f", or {plain}" if grouped else ""
        return f"; write {text.replace(',', '.')} with a decimal point{or_plain}"
    if grouped:
        return f"; write {plain} without separators"
    if separated:
        return "; write one number, in digits without separators"
    number = _number(text)
    return "" if number is None else f"; write {show(number)} without quotes"


def _number(text: str) -> int | float | None:
    """The number that ``text`` spells, or None."""
    try:
        value = parse_plain(text)
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
