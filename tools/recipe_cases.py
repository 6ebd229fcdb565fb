"""Recipes, levels and layouts of a small Llama, and why some of them are refused: what
``tools/recipe_layouts.py`` shows and trains.

A case is a value of ``precision.recipe`` (all that the schema knows, and ``profile: paper``), a level (``O0``
with FP8 GEMMs) and a layout. Its configuration is ``configs/small/llama.yaml`` with its overrides. It is
*refused* where reading that configuration, counting its processes or planning its GEMMs and optimizer states
raises; else it is *legal*. No process group is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from fp8train.comm.processes import Layout
from fp8train.config.errors import ConfigError
from fp8train.config.precision_schema import PrecisionConfig
from fp8train.config.recipe_registry import RECIPE_NAMES
from fp8train.config.resolve import load_config
from fp8train.config.world import check_world

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "configs/small/llama.yaml"
PAPER = "profile: paper"
RECIPES: tuple[str, ...] = (*RECIPE_NAMES, PAPER)
LEVELS: tuple[str, ...] = get_args(PrecisionConfig.model_fields["level"].annotation)
COMMON = ("train.micro_batch_size=1",)
"""Two micro-batches a step: one for each data-parallel rank, or for each pipeline stage."""


class Place(NamedTuple):
    """Ranks of a layout and what a configuration says about them."""

    ranks: int
    layout: Layout
    overrides: tuple[str, ...]


LAYOUTS: dict[str, Place] = {
    "1 process": Place(1, Layout(), ()),
    "DP2": Place(2, Layout(), ()),
    "TP2": Place(2, Layout(tp=2), ("parallel.tp=2",)),
    "PP2": Place(2, Layout(pp=2), ("parallel.pp=2",)),
    "CP2": Place(2, Layout(cp=2), ("parallel.cp=2",)),
    "DP2, ZeRO": Place(2, Layout(), ("parallel.zero=1",)),
}
_UNTIED = "model.tie_embeddings=false"
NEEDS: dict[str, tuple[str, ...]] = {
    "mus": (_UNTIED, "optimizer.lr=0.3"),
    "unit_scaling": (_UNTIED, "optimizer.lr=0.03"),
    "umup": (_UNTIED, "optimizer.lr=0.5"),
}
"""What a recipe needs beside its name on this model; weights of unit variance take larger rates, here such
that 20 steps show something."""
SETTINGS: tuple[tuple[str, ...], ...] = (
    ("precision.profile=paper",),
    ("precision.weights=fp8",),
    ("precision.traffic.activations=fp8",),
    ("precision.gradient.fp8.reduce=shared_scale",),
    ("precision.gradient.fp8.reduce=exact", "run.threads=1"),
    ("model.tie_embeddings=true",),
    ("precision.gemm.fp8=false",),
    ("train.compile=block",),
)
"""Laid over every legal case, one at a time."""
SETTINGS_ON = ("1 process", "TP2", "PP2")


@dataclass(frozen=True, order=True)
class Case:
    """One cell of the table."""

    recipe: str
    level: str
    layout: str

    @property
    def overrides(self) -> list[str]:
        """What turns the small Llama into this case."""
        chosen = "precision.profile=paper" if self.recipe == PAPER else f"precision.recipe={self.recipe}"
        baseline = ["precision.gemm.fp8=true"] if self.level == "O0" else []
        needs = NEEDS.get(self.recipe, ())
        place = LAYOUTS[self.layout].overrides
        return [*COMMON, f"precision.level={self.level}", *baseline, chosen, *needs, *place]


def all_cases(layouts: Iterable[str] = LAYOUTS) -> list[Case]:
    """Every recipe, level and layout."""
    return [Case(r, level, layout) for r in RECIPES for level in LEVELS for layout in layouts]


def refusal(case: Case, setting: Sequence[str] = ()) -> str | None:
    """Why the case cannot run, in one line; None if it can."""
    try:
        config = load_config(CONFIGURATION, [*case.overrides, *setting]).config
        check_world(config, LAYOUTS[case.layout].ranks)
    except ConfigError as error:
        text = "; ".join(line.strip() for line in str(error).splitlines())
        return text.replace("command line: ", "").replace(f"{ROOT}/", "")
    return None


def refusals() -> dict[Case, str]:
    """All refused cases and their reasons; the others are legal."""
    found = {case: refusal(case) for case in all_cases()}
    return {case: reason for case, reason in found.items() if reason is not None}


def legal_cases(refused: Mapping[Case, str], layouts: Iterable[str] = LAYOUTS) -> list[Case]:
    """What can run."""
    return [case for case in all_cases(layouts) if case not in refused]


def setting_refusals(refused: Mapping[Case, str], setting: Sequence[str]) -> dict[Case, str]:
    """Legal cases that one more setting makes illegal."""
    found = {case: refusal(case, setting) for case in legal_cases(refused, SETTINGS_ON)}
    return {case: reason for case, reason in found.items() if reason is not None}


class Tables(NamedTuple):
    """All refusals: of cases, and of legal cases with one more setting."""

    refused: dict[Case, str]
    with_setting: dict[tuple[str, ...], dict[Case, str]]


def all_refusals() -> Tables:
    """Computed from the schema as it is."""
    refused = refusals()
    return Tables(refused, {setting: setting_refusals(refused, setting) for setting in SETTINGS})
