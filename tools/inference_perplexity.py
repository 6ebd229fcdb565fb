"""Perplexity of trained models with their own FP8 numerics and in BF16, as a Markdown table.

    python tools/inference_perplexity.py --runs runs/quickstart/llama_fp8 ...
    python tools/inference_perplexity.py --train runs/inference       # the small Llama, every recipe
    python tools/inference_perplexity.py --as-recipes runs/inference/current --recipes rowwise mxfp8 ...

``--train OUT`` trains each of ``--recipes`` (a recipe of ``precision.recipe``, or ``paper`` for the
profile) into OUT/RECIPE, and continues or skips what is there already: the file of ``configs/recipes``,
which is the small Llama at level O2 with what the recipe needs, or ``--config`` with the recipe laid over
it. Its dataset must exist (configs/small/llama.yaml says how to make it); ``--overrides`` go to the
training. ``--as-recipes RUN`` evaluates one trained model as each of ``--recipes`` would multiply it:
weights of the standard parametrisation do not know how scales were chosen, so recipes whose scales are
current or constant need no training of their own (delayed scales are in the checkpoint, and static recipes
are other models). Every model is evaluated on the samples of its own validation, all of them with
``--batches`` large enough.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fp8train.comm.processes import choose_device
from fp8train.config.recipe_registry import RECIPE_NAMES, STATIC_RECIPES
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config
from fp8train.evaluation.perplexity import Measurement, measure, open_text, relative_difference
from fp8train.inference.load import TrainedRun, open_run
from fp8train.training.run import prepare_machine

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "configs/small/llama_fp8.yaml"
RECIPES = [*RECIPE_NAMES, "paper"]
HEADINGS = ("recipe", "level", "step", "tokens", "BF16 perplexity", "FP8 perplexity", "difference")


def train(config: Path | None, out: Path, recipe: str, overrides: list[str]) -> Path:
    """Train (or finish, or find finished) the run of a recipe; its directory."""
    choice = ["precision.profile=paper"] if recipe == "paper" else [f"precision.recipe={recipe}"]
    if config is None:
        config = SMALL if recipe == "paper" else ROOT / f"configs/recipes/{recipe}.yaml"
        choice += ["precision.level=O2"] if recipe == "paper" else []
    options = [*choice, *overrides, f"run.dir={out}", f"run.name={recipe}", "checkpoint.resume=auto"]
    command = [sys.executable, "-m", "fp8train", "train", str(config), *options]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return out / recipe


def as_recipe(run: TrainedRun, recipe: str) -> TrainedRun:
    """The run as if it had been trained with ``recipe``, at its own level."""
    if recipe in STATIC_RECIPES or recipe.startswith("te_delayed") or recipe == "paper":
        raise SystemExit(f"--as-recipes: {recipe} needs a training of its own; use --train")
    file = ROOT / f"configs/recipes/{recipe}.yaml"
    config = load_config(file, [f"precision.level={run.config.precision.level}"]).config
    if config.model != run.config.model:
        raise SystemExit(f"--as-recipes: {run.path} is another model than {file} trains")
    return replace(run, config=run.config.model_copy(update={"precision": config.precision}))


def label(config: Config) -> str:
    """What chose the scales."""
    precision = config.precision
    return precision.recipe if precision.profile == "default" else f"profile {precision.profile}"


def level(config: Config) -> str:
    """``precision.level``; FP8 GEMMs alone are O0 with an addition."""
    precision = config.precision
    return "FP8 GEMMs" if precision.level == "O0" and precision.gemm.fp8 else precision.level


def row(run: TrainedRun, *, batches: int | None, device: torch.device) -> str:
    """A line of the table; a run without FP8 has no FP8 perplexity."""
    prepare_machine(run.config, 1)
    text = open_text(run, num_batches=batches)
    bf16 = measure(run, text, "bf16", device=device)
    fp8: Measurement | None = None
    if run.config.precision.gemm.fp8:
        fp8 = measure(run, text, "matched", device=device)
    cells = [
        label(run.config) if fp8 else "no FP8",
        level(run.config),
        str(run.step),
        f"{bf16.evaluation.tokens:,}",
        f"{bf16.perplexity:.4f}",
        f"{fp8.perplexity:.4f}" if fp8 else "",
        f"{100 * relative_difference(fp8, bf16):+.3f} %" if fp8 else "",
    ]
    return "| " + " | ".join(cells) + " |"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", nargs="+", type=Path, metavar="DIR", help="run directories or checkpoints")
    source.add_argument("--as-recipes", type=Path, metavar="DIR", help="one run, multiplied as --recipes do")
    source.add_argument("--train", type=Path, metavar="OUT", help="train every recipe into OUT first")
    parser.add_argument("--config", type=Path, help="what --train trains; default: configs/recipes")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--batches", type=int, help="global batches to evaluate; default: the run's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="for --train")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    given = arguments()
    if given.as_recipes is not None:
        trained = open_run(given.as_recipes)
        runs = [as_recipe(trained, recipe) for recipe in given.recipes]
    else:
        paths = given.runs or [
            train(given.config, given.train, recipe, given.overrides) for recipe in given.recipes
        ]
        runs = [open_run(path) for path in paths]
    print("| " + " | ".join(HEADINGS) + " |")
    print("|---" * len(HEADINGS) + "|")
    device = choose_device(given.device, 0)
    for run in runs:
        print(row(run, batches=given.batches, device=device), flush=True)


if __name__ == "__main__":
    main()
