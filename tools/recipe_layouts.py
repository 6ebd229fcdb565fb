"""Which recipe runs at which level on which layout of a small Llama, and why not where it does not.

    python tools/recipe_layouts.py                                      # the tables, without training
    python tools/recipe_layouts.py --json runs/recipe_layouts.json      # the same for programs
    python tools/recipe_layouts.py --markdown docs/recipe_layouts.md    # rewrite what follows the marker
    python tools/recipe_layouts.py --train FILE.json [--limit N]        # 20 steps each; resumable

``tools/recipe_cases.py`` has the cases and says what is refused. ``--train`` runs the legal ones of
:data:`TRAINED` on gloo: the small model (all its sizes and its vocabulary) on short samples of
synthetic text whose tokens come from a few entries of the vocabulary, which a model learns in a few steps. A
case passes if every loss is finite, all ranks have the same ones and the last five are below the first.
Results go to one JSON file after each case; a case that passed is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the workers and the synthetic text are the tests'

from fp8train.comm.processes import Layout, joined_processes  # noqa: E402
from fp8train.config.resolve import load_config  # noqa: E402
from fp8train.step.trainer import Trainer  # noqa: E402
from tests.distributed.pool import GlooPool  # noqa: E402
from tests.training.tiny import alone, batches  # noqa: E402
from tools.recipe_cases import (  # noqa: E402
    CONFIGURATION,
    LAYOUTS,
    LEVELS,
    NEEDS,
    RECIPES,
    SETTINGS_ON,
    Case,
    Tables,
    all_cases,
    all_refusals,
    legal_cases,
    refusals,
)

TRAINED_RESULTS = ROOT / "tools/bench/results/recipe_layouts.json"
MARKER = "<!-- below: tools/recipe_layouts.py -->"
TRAINED = ("1 process", "DP2", "TP2", "PP2")


def level_range(levels: Iterable[str]) -> str:
    """``O0 to O2, O3``: levels in runs."""
    present = set(levels)
    runs: list[list[str]] = [[]]
    for level in LEVELS:
        if level in present:
            runs[-1].append(level)
        elif runs[-1]:
            runs.append([])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs if run)


def cell(recipe: str, layout: str, refused: Mapping[Case, str], notes: list[str]) -> str:
    """Legal levels, and the refused ones with the number of their reason in ``notes``, which grows."""
    levels: dict[str | None, list[str]] = {}
    for level in LEVELS:
        levels.setdefault(refused.get(Case(recipe, level, layout)), []).append(level)
    parts = [level_range(levels.pop(None, []))]
    for reason, ones in levels.items():
        assert reason is not None
        if reason not in notes:
            notes.append(reason)
        parts.append(f"{level_range(ones)} refused [{notes.index(reason) + 1}]")
    return "; ".join(filter(None, parts))


def main_table(refused: Mapping[Case, str]) -> str:
    """Markdown: a row per recipe, a column per layout, the reasons below."""
    notes: list[str] = []
    lines = _head(["recipe", "also set", *LAYOUTS])
    for recipe in RECIPES:
        cells = [cell(recipe, layout, refused, notes) for layout in LAYOUTS]
        lines.append(_row([f"`{recipe}`", " ".join(f"`{o}`" for o in NEEDS.get(recipe, ())), *cells]))
    lines += ["", *(_wrapped(f"{number}. {_literal(note)}", "   ") for number, note in enumerate(notes, 1))]
    return "\n".join(lines)


def settings_table(tables: Tables) -> str:
    """Markdown: what one more setting makes illegal, and why."""
    lines = _head(["one more setting", "refused with", "levels", "layouts", "reason"])
    for setting, found in tables.with_setting.items():
        groups: dict[tuple[str, str, str], dict[str, str]] = {}
        for recipe, level_set, layout_set, reason in _regions(found, tables.refused):
            general = re.sub(rf"\b{re.escape(recipe)}\b", "RECIPE", reason)
            groups.setdefault((level_set, layout_set, general), {})[recipe] = reason
        for (level_set, layout_set, general), reasons in groups.items():
            named = " ".join(f"`{o}`" for o in setting)
            reason = general if len(reasons) > 1 else next(iter(reasons.values()))
            lines.append(_row([named, _names(list(reasons)), level_set, layout_set, _literal(reason)]))
    return "\n".join(lines)


def _names(recipes: list[str]) -> str:
    """All of them, all but a few, or the list."""
    others = [recipe for recipe in RECIPES if recipe not in recipes]
    listed = ", ".join(f"`{recipe}`" for recipe in (others if len(others) < len(recipes) else recipes))
    if len(others) < len(recipes):
        return f"all but {listed}" if others else "all"
    return listed


def _regions(found: Mapping[Case, str], refused: Mapping[Case, str]) -> list[tuple[str, str, str, str]]:
    """(recipe, levels, layouts, reason), equal reasons together: layouts that have the same levels. Cases
    that are ``refused`` anyhow do not count."""
    levels: dict[tuple[str, str, str], list[str]] = {}
    for case, reason in found.items():
        levels.setdefault((case.recipe, reason, case.layout), []).append(case.level)
    layouts: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (recipe, reason, layout), ones in levels.items():
        layouts.setdefault((recipe, reason, tuple(ones)), []).append(layout)
    here = legal_cases(refused, SETTINGS_ON)
    regions = []
    for (recipe, reason, ones), places in layouts.items():
        every = {case.layout for case in here if case.recipe == recipe and case.level in ones}
        told = "every layout" if set(places) == every else ", ".join(places)
        regions.append((recipe, level_range(ones), told, reason))
    return regions


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|---" * len(titles) + "|"]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _literal(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([*_|<>])", r"\\\1", text)


def _wrapped(text: str, indent: str = "") -> str:
    """Prose in lines of at most 100 columns; ``indent``: of all but the first."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def trained_summary(results: Mapping[str, Any], refused: Mapping[Case, str]) -> str:
    """How many legal cases were trained and passed, in one sentence; those that failed, by name."""
    wanted = set(legal_cases(refused, TRAINED))
    verdicts = {case_of(run): run["ok"] for run in results["runs"] if case_of(run) in wanted}
    failed = sorted(case for case, ok in verdicts.items() if not ok)
    line = (
        f"{sum(verdicts.values())} of the {len(wanted)} legal cases on {', '.join(TRAINED)} were trained for "
        f"{results['steps']} steps, and their losses were finite and fell"
    )
    if failed:
        line += f"; {len(failed)} failed: " + ", ".join(f"{c.recipe} {c.level} {c.layout}" for c in failed)
    missing = len(wanted) - len(verdicts)
    return line + (f"; {missing} not trained yet." if missing else ".")


def render(tables: Tables) -> str:
    """What ``docs/recipe_layouts.md`` says below the marker."""
    total, refused = len(all_cases()), tables.refused
    trained = trained_summary(json.loads(TRAINED_RESULTS.read_text()), refused)
    counted = _wrapped(f"{total - len(refused)} of {total} cases are legal. {trained}")
    return f"\n{counted}\n\n{main_table(refused)}\n\n{settings_table(tables)}\n"


def as_json(tables: Tables) -> dict[str, Any]:
    """The same for programs: every case with its reason, or null where it is legal."""
    return {
        "configuration": str(CONFIGURATION.relative_to(ROOT)),
        "cases": [
            {**asdict(case), "overrides": case.overrides, "refused": tables.refused.get(case)}
            for case in all_cases()
        ],
        "refused_with_setting": [
            {**asdict(case), "setting": setting, "refused": reason}
            for setting, found in tables.with_setting.items()
            for case, reason in found.items()
        ],
    }


STEPS = 20
VOCAB_SIZE = 12288
"""The tokenizer of ``configs/small`` has as many pieces."""
SHORT = (
    *(
        f"train.steps={STEPS}",
        "data.seq_length=64",
        f"model.vocab_size={VOCAB_SIZE}",
        "train.eval_interval=0",
    ),
    *("logging.cast_statistics_interval=0", "run.threads=1", "run.device=cpu"),
)


def one_rank(
    group: dist.ProcessGroup | None, rank: int, world_size: int, overrides: list[str], layout: Layout
) -> tuple[list[float], int]:
    """Runs in the pool: losses of all steps, and parameters of this rank."""
    config = load_config(CONFIGURATION, overrides).config
    processes = alone() if group is None else joined_processes(torch.device("cpu"), layout)
    trainer = Trainer(config, processes, vocab_size=VOCAB_SIZE)
    data = batches(config, processes)
    losses = [float(trainer.step(i, data.batch(i)).loss) for i in range(config.train.steps or 0)]
    return losses, sum(parameter.numel() for parameter in trainer.model.parameters())


def train(case: Case, pool: GlooPool) -> dict[str, Any]:
    """Train one case; its result, a failure included."""
    place = LAYOUTS[case.layout]
    began = time.monotonic()
    result: dict[str, Any] = {**asdict(case), "overrides": case.overrides}
    overrides = [*case.overrides, *SHORT]
    try:
        per_rank = pool.run(
            one_rank, place.ranks, overrides, place.layout, timeout=600.0, join=place.ranks > 1
        )
    except Exception as error:  # a case that crashes is a result, too
        return result | {"ok": False, "error": f"{type(error).__name__}: {error}"}
    losses = per_rank[0][0]
    finite = all(math.isfinite(loss) for loss in losses)
    falls = sum(losses[-5:]) / 5 < losses[0]
    agree = all(ones == losses for ones, _ in per_rank)
    return result | {
        "ok": finite and falls and agree,
        "losses": [round(loss, 4) if math.isfinite(loss) else str(loss) for loss in losses],
        "parameters_per_rank": [count for _, count in per_rank],
        "seconds": round(time.monotonic() - began, 1),
    }


def case_of(run: Mapping[str, Any]) -> Case:
    """What a result is of."""
    return Case(run["recipe"], run["level"], run["layout"])


class Results:
    """The file of results, rewritten after each: a kill leaves the old one or the new one, whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        same = known.get("overrides") == list(SHORT)
        self.runs: list[dict[str, Any]] = known["runs"] if same else []

    def passed(self, case: Case) -> bool:
        """Whether this very configuration has trained."""
        return any(
            run["ok"] and case_of(run) == case and run["overrides"] == case.overrides for run in self.runs
        )

    def add(self, run: dict[str, Any]) -> None:
        """In place of an earlier one of the same case; one line each."""
        self.runs = [old for old in self.runs if case_of(old) != case_of(run)] + [run]
        about = {"script": "tools/recipe_layouts.py", "steps": STEPS, "overrides": list(SHORT)}
        lines = ",\n".join(json.dumps(one) for one in self.runs)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(f'{json.dumps(about)[:-1]}, "runs": [\n{lines}\n]}}\n')
        draft.replace(self.path)


def train_all(out: Path, limit: int | None) -> bool:
    """Train what has not passed yet; whether everything that was trained now did."""
    results = Results(out)
    cases = legal_cases(refusals(), TRAINED)
    missing = [case for case in cases if not results.passed(case)]
    print(f"{len(cases)} legal cases, {len(missing)} to train", flush=True)
    ok = True
    pool = GlooPool()
    try:
        for number, case in enumerate(missing[:limit], 1):
            run = train(case, pool)
            results.add(run)
            ok = ok and run["ok"]
            told = f"{run['losses'][0]} -> {run['losses'][-1]}" if "losses" in run else run["error"]
            name = f"{case.recipe} {case.level} {case.layout}"
            print(f"{number}/{len(missing)} {'ok' if run['ok'] else 'FAILED'} {name}: {told}", flush=True)
    finally:
        pool.close()
    return ok


def main() -> int:
    """Show, write or train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, metavar="FILE", help="train legal cases, results to FILE")
    parser.add_argument("--limit", type=int, help="train at most this many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write legal and refused cases to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="rewrite FILE below its marker")
    args = parser.parse_args()
    if args.train is not None:
        return 0 if train_all(args.train, args.limit) else 1
    tables = all_refusals()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(as_json(tables), indent=1) + "\n")
    text = render(tables)
    print(text)
    if args.markdown is not None:
        prose = args.markdown.read_text().partition(MARKER)[0]
        args.markdown.write_text(f"{prose}{MARKER}\n{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
