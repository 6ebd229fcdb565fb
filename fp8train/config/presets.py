"""Values that one key chooses for others: ``model.family``, ``precision.level``, ``.recipe``,
``.profile``, ``.state.plan``, ``parametrization.kind``, ``engine``.

A preset is data, not code: a table from a choice to the dotted keys it fills. :data:`PRESETS` lists the
tables in the order in which they are laid over each other (the later wins), and whatever a person writes wins
over all of them. So a new level, recipe or profile is one more table. What must be *computed* from other keys
(``head_dim`` from the width) is in :func:`derive`.

Filling happens before validation, on possibly wrong input: a choice that is not in its table, or an
ingredient of the wrong type, fills nothing and is left to the schema to report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fp8train.config.nodes import Node, Origin, Scalar, merge, nest
from fp8train.config.ownership import without_what_is_moot
from fp8train.config.recipe_registry import DEFAULT_RECIPE, RECIPES
from fp8train.config.recipe_values import Values


@dataclass(frozen=True)
class PresetTable:
    """One key whose value fills others.

    ``choices`` maps each legal value of ``key`` to the dotted keys it sets; ``default`` is the choice when
    the key is absent (None: the key is required). A key that describes what is not so is not filled:
    :mod:`fp8train.config.ownership`.
    """

    key: str
    choices: Mapping[str, Values]
    default: str | None = None


class Problem(NamedTuple):
    """Something wrong with the value at ``path``.

    ``related`` are other keys that it contradicts, ``missing`` says that there is no value, and ``origin`` is
    where to look if the tree no longer has ``path``.
    """

    path: tuple[str | int, ...]
    message: str
    related: tuple[str, ...] = ()
    missing: bool = False
    origin: Origin | None = None


_FAMILIES: dict[str, Values] = {
    "gpt": {
        "model.positions": "learned",
        "model.norm": "layernorm",
        "model.activation": "gelu",
        "model.bias": True,
        "model.tie_embeddings": True,
    },
    "llama": {
        "model.positions": "rope",
        "model.norm": "rmsnorm",
        "model.activation": "swiglu",
        "model.bias": False,
        "model.tie_embeddings": False,
    },
}

_GRADIENTS: Values = {
    "precision.gradient.accumulate": "fp32",
    "precision.gradient.reduce": "fp32",
    "precision.gradient.fp8.accumulate": "bf16",
    "precision.gradient.fp8.reduce": "exchange",
    "precision.gradient.fp8.block": 128,
}


def _states(master: str, exp_avg: str, exp_avg_sq: str) -> Values:
    """Formats of the three states; a master in 16 bits is rounded stochastically."""
    formats = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    rounding = "stochastic" if master == "fp16_scaled" else "nearest"
    return {
        **{f"precision.state.{role}.format": name for role, name in formats.items()},
        "precision.state.master.rounding": rounding,
    }


_FORWARD: Values = {"precision.gemm.fast_accumulation": True}
_TRAFFIC = ("activations", "grad_output", "grad_input", "weights")


def _traffic(kind: str) -> Values:
    """What ranks send each other besides gradients; outputs and pipeline traffic stay as they are."""
    return {f"precision.traffic.{name}": kind for name in _TRAFFIC}


_FP8: Values = {
    **_FORWARD,
    "precision.gemm.fp8": True,
    "precision.gradient.format": "e4m3",
    "precision.weights": "fp8",
    **_GRADIENTS,
}
_O2: Values = {**_FP8, **_states("fp16_scaled", "e4m3", "fp16_scaled")}
_LEVELS: dict[str, Values] = {
    "O0": {
        "precision.gemm.fp8": False,
        **_FORWARD,
        "precision.gradient.format": "high_precision",
        "precision.weights": "compute",
        **_GRADIENTS,
        **_states("fp32", "fp32", "fp32"),
        **_traffic("compute"),
    },
    "O1": {**_FP8, **_states("fp16_scaled", "fp32", "fp32"), **_traffic("compute")},
    "O2": {**_O2, **_traffic("compute")},
    "O3": {**_O2, **_traffic("fp8"), "parallel.zero": 1},
}
"""FP8-LM's levels in our defaults; each adds to the one before (FP8-LM section 2; names from MS-AMP)."""

_DELAYED_OPERANDS = ("output.x", "grad_input.grad_output", "grad_weight.grad_output", "grad_weight.x")
_PROFILES: dict[str, Values] = {
    "default": {},
    # FP8-LM and its code, MS-AMP: windows of 16 for activations and output gradients, of 1 (current) for
    # weights.
    "paper": {
        **{f"precision.gemm.{operand}.scale_source": "delayed" for operand in _DELAYED_OPERANDS},
        "precision.gemm.fast_accumulation": False,
        "precision.gradient.fp8.reduce": "shared_scale",
        "precision.gradient.fp8.mu_initial": "one_over_root_ranks",
        **{f"precision.state.{role}.granularity": "tensor" for role in ("master", "exp_avg", "exp_avg_sq")},
        "precision.state.master.rounding": "nearest",
        "precision.state.bounded_update": False,
    },
}

_COAT_MOMENT: Values = {"format": "e4m3", "granularity": "block", "rounding": "nearest", "expand": True}
_STATE_PLANS: dict[str, Values] = {
    "default": {},
    # Xi et al. 2024 (COAT), arXiv 2410.19313, section 4: both moments in E4M3, groups of 128, expanded. It
    # leaves master weights alone: the level's stay.
    "coat": {
        f"precision.state.{moment}.{key}": value
        for moment in ("exp_avg", "exp_avg_sq")
        for key, value in _COAT_MOMENT.items()
    },
    # Fishman et al. 2024, arXiv 2409.12517, section 5: one scale per tensor, nothing stochastic.
    "e4m3_e5m2": {
        f"precision.state.{role}.{key}": value
        for role, number_format in (("master", "fp16_scaled"), ("exp_avg", "e4m3"), ("exp_avg_sq", "e5m2"))
        for key, value in {"format": number_format, "granularity": "tensor", "rounding": "nearest"}.items()
    },
    # One byte for the second moment: its root, which spans half the exponents. Rounded to nearest it would
    # stop falling: at beta2 = 0.95 a step takes 2.5 % off the root, and half a unit of E4M3 is up to 6 %.
    "lean": {
        **{f"precision.state.{role}.granularity": "block" for role in ("master", "exp_avg", "exp_avg_sq")},
        **_states("fp16_scaled", "e4m3", "e4m3"),
        "precision.state.exp_avg_sq.rounding": "stochastic",
        "precision.state.exp_avg_sq.sqrt": True,
    },
}
"""Formats of optimizer states beyond those of the levels."""

_UNTIED: Values = {"model.tie_embeddings": False}
_PARAMETRIZATIONS: dict[str, Values] = {
    "standard": {},
    "mus": {
        **_UNTIED,
        "model.norm_placement": "branch_end",
        "parametrization.residual": "fixed",
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_rule": "fully_decoupled",
    },
    "unit_scaling": {
        **_UNTIED,
        "parametrization.residual": "running_mean",
    },
    # The u-μP authors' own runs: no gain in norms, independent decay, no clipping (gradients have unit
    # scale).
    "umup": {
        **_UNTIED,
        "model.norm_gain": False,
        "parametrization.residual": "umup",
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_rule": "independent",
        "optimizer.clip_grad_norm": 0.0,
    },
}

_ENGINES: dict[str, Values] = {
    "native": {},
    # Its engine keeps master weights, in FP32, and writes the model's weights from them.
    "deepspeed": {
        "precision.weights": "compute",
        "precision.state.master.format": "fp32",
        **_traffic("compute"),
    },
}

PRESETS: tuple[PresetTable, ...] = (
    PresetTable("model.family", _FAMILIES),
    PresetTable("precision.level", _LEVELS, default="O0"),
    PresetTable(
        "precision.recipe", {name: recipe.values for name, recipe in RECIPES.items()}, DEFAULT_RECIPE
    ),
    PresetTable("precision.profile", _PROFILES, default="default"),
    PresetTable("precision.state.plan", _STATE_PLANS, default="default"),
    PresetTable("parametrization.kind", _PARAMETRIZATIONS, default="standard"),
    PresetTable("engine", _ENGINES, default="native"),
)
"""All tables, in the order in which they win: a later one overrides an earlier one, explicit values override
all."""

DERIVED = ("model.num_kv_heads", "model.head_dim", "model.ffn_hidden_size", "model.max_seq_len")
"""Keys that :func:`derive` computes when they are not given."""


def filled_keys() -> frozenset[str]:
    """Every dotted key that presets or derivation can fill, so that a user need not write it."""
    from_tables = {key for table in PRESETS for values in table.choices.values() for key in values}
    return frozenset(from_tables | set(DERIVED))


def chosen(table: PresetTable, tree: Node) -> str | None:
    """The choice that holds for ``table``: the one in ``tree``, else its default; None if there is no legal
    one."""
    node = tree.find(table.key.split("."))
    value = table.default if node is None else node.value
    return value if isinstance(value, str) and value in table.choices else None


def apply_presets(explicit: Node) -> tuple[Node, list[Problem]]:
    """``explicit`` laid over the presets it chooses, with derived keys added.

    Returns:
        The filled tree and what made a derivation impossible (two keys that do not fit together).
    """
    filled = Node({}, explicit.origin)
    for table in PRESETS:
        tree = merge(filled, explicit, null_takes_back=False)
        choice = chosen(table, tree)  # perhaps a choice that an earlier preset made
        if choice is None or _is_refused(table, choice, tree):
            continue
        origin = Origin("preset", f"{table.key}={choice}")
        for key, value in table.choices[choice].items():
            filled = merge(filled, nest(key.split("."), _leaf(value, origin)))
    tree = merge(filled, explicit, null_takes_back=False)
    return derive(without_what_is_moot(tree))


def _is_refused(table: PresetTable, choice: str, tree: Node) -> bool:
    """Whether the schema will refuse the choice for another one; laid over that, it would only make noise."""
    recipe = tree.find(("precision", "recipe"))
    return (table.key, choice) == ("precision.profile", "paper") and (
        recipe is not None and recipe.value != "current"
    )


def _leaf(value: Scalar | tuple[str, ...], origin: Origin) -> Node:
    if isinstance(value, tuple):
        return Node([Node(entry, origin) for entry in value], origin, 1 + len(value))
    return Node(value, origin)


def derive(tree: Node) -> tuple[Node, list[Problem]]:
    """Fill the keys of :data:`DERIVED` that are absent and whose ingredients are valid."""
    problems: list[Problem] = []
    model = tree.child("model")
    if model is None or not isinstance(model.value, dict):
        return tree, problems
    hidden_size, num_heads = _whole(tree, "model.hidden_size"), _whole(tree, "model.num_heads")
    computed: dict[str, tuple[int | None, str]] = {
        "model.num_kv_heads": (num_heads, "model.num_heads"),
        "model.head_dim": (None, "model.hidden_size / model.num_heads"),
        "model.ffn_hidden_size": _ffn_hidden_size(tree, hidden_size),
        "model.max_seq_len": (_whole(tree, "data.seq_length"), "data.seq_length"),
    }
    if hidden_size and num_heads:
        if hidden_size % num_heads == 0:
            computed["model.head_dim"] = (hidden_size // num_heads, computed["model.head_dim"][1])
        elif tree.find(("model", "head_dim")) is None:
            message = (
                f"the width {hidden_size} is not a multiple of the number of heads {num_heads}; "
                "change one of them or set model.head_dim"
            )
            problems.append(Problem(("model", "hidden_size"), message, ("model.num_heads",)))
    for key, (value, formula) in computed.items():
        path = key.split(".")
        if value is not None and tree.find(path) is None:
            tree = merge(tree, nest(path, Node(value, Origin("derived", f"from {formula}"))))
    return tree, problems


def _whole(tree: Node, key: str) -> int | None:
    """A positive integer at ``key``, or None."""
    node = tree.find(key.split("."))
    value = None if node is None else node.value
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _ffn_hidden_size(tree: Node, hidden_size: int | None) -> tuple[int | None, str]:
    """MLP width: ``4h`` (gpt), or ``8h/3`` rounded up to a multiple of 256 (llama; Llama's own code,
    ``multiple_of``)."""
    family = chosen(PRESETS[0], tree)
    if hidden_size is None or family is None:
        return None, ""
    if family == "gpt":
        return 4 * hidden_size, "4 * model.hidden_size"
    return -(-(8 * hidden_size // 3) // 256) * 256, "8/3 * model.hidden_size, up to 256"
