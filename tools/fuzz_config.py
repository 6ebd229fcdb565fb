"""Whatever ``fp8train config`` accepts, training runs: random configurations of the quick start's model.

    python tools/fuzz_config.py --count 200            # about five minutes on two cores
    python tools/fuzz_config.py --seed 7 --only 41     # one of them again, with its whole error

Each configuration is the quick start's with random explicit settings over all sections, drawn one at a time:
one that ``config`` refuses beside the others is drawn anew. It trains two steps on random tokens, in this
process's workers; a share of them on two ranks. It may run, or be refused for a reason that only the machine
or the data know (:data:`ONLY_KNOWN_LATE`). Anything else is found: ``config`` should have said so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from fp8train.cli.train_command import train_command  # noqa: E402
from fp8train.config.dump import dump_plain  # noqa: E402
from fp8train.config.errors import ConfigError, UserError  # noqa: E402
from fp8train.config.keys import Key, key_table  # noqa: E402
from fp8train.config.nodes import Plain  # noqa: E402
from fp8train.config.resolve import ResolvedConfig, load_config  # noqa: E402
from fp8train.config.world import check_world  # noqa: E402
from fp8train.data.errors import DataError  # noqa: E402
from fp8train.data.indexed_dataset import IndexedDatasetWriter  # noqa: E402
from fp8train.step.non_finite import NoTargetsError  # noqa: E402
from tests.distributed.pool import GlooPool  # noqa: E402

CONFIGURATION = ROOT / "configs/quickstart/llama.yaml"
VOCAB, STEPS = 256, 2
TIMEOUT_S = 150.0
MOST_SETTINGS = 8

FIXED = frozenset(
    (
        *("run.name", "run.dir", "run.overwrite", "train.steps", "train.tokens"),
        *("data.prefix", "data.blend", "data.valid_prefix", "data.tokenizer", "model.vocab_size"),
        *("checkpoint.resume", "checkpoint.init_from", "checkpoint.accept_changes", "logging.wandb.mode"),
        *("data.kind", "data.mask_end_of_document"),
    )
)
"""What the harness sets, or what needs files that there would have to be."""
CHOOSERS = (
    *("precision.level", "precision.recipe", "precision.profile", "model.family", "optimizer.name"),
    *("precision.gradient.fp8.reduce", "precision.state.plan", "parametrization.kind", "precision.compute"),
    *("precision.gradient.format", "precision.gemm.fp8", "schedule.kind", "precision.guard.action"),
)
"""Drawn more often: others follow from them."""
MENU: dict[str, Sequence[Any]] = {
    "run.device": ("auto", "cpu"),
    "run.threads": (1, 2),
    "model.num_layers": (1, 2, 3, 4),
    "model.hidden_size": (32, 48, 64, 96, 128),
    "model.num_heads": (1, 2, 3, 4),
    "model.num_kv_heads": (1, 2, 4),
    "model.head_dim": (16, 24, 32, 64),
    "model.ffn_hidden_size": (64, 100, 128, 256, 384),
    "model.vocab_multiple": (1, 2, 64, 100, 128),
    "model.max_seq_len": (32, 256, 512),
    "model.rope_scaling": ({}, {"factor": 2.0}),
    "data.seq_length": (8, 32, 64, 100, 128),
    "data.split": ([1, 0, 0], [0.5, 0.5, 0], [0.9, 0.05, 0.05]),
    "optimizer.lr": (1e-4, 1e-2, 0.5),
    "precision.gemm.exclude": (["layers.0.*"], ["*.mlp.down"], ["*.attention.*"], ["layers.*"]),
    "precision.gemm.min_dim": (16, 64, 96, 200),
    "precision.gradient.bucket_mib": (0.001, 0.1, 25.0),
    "precision.gradient.fp8.node_size": (1, 2),
    "parallel.dp": (1, 2, "auto"),
    "parallel.tp": (1, 2),
    "parallel.cp": (1, 2),
    "parallel.pp": (1, 2),
    "parallel.pipeline.layers": ([1, 1], [1, 2], [1, 1, 1, 1]),
    "parallel.pipeline.stages_per_rank": (1, 2),
    "schedule.warmup_steps": (0, 1, 2),
    "train.global_batch_size": (1, 2, 4, 6, 8),
    "train.micro_batch_size": (1, 2, 4),
    "train.batch_size_ramp": ([{"steps": 1, "global_batch_size": 2}],),
    "train.compile": ("off",),
    "train.consistency_interval": (0, 1),
    "train.eval_interval": (0, 1, 2),
    "train.eval_batches": (1, 2),
    "checkpoint.interval": (0, 1),
    "logging.interval": (1, 2),
    "logging.cast_statistics_interval": (0, 1, 2),
}
"""Values of keys for which random ones would take long or never fit. Compiling takes a minute a model: with
``--compile`` only."""
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"parallel.zero": 1},
    {"parallel.pp": 2},
    # Rows that a cut leaves with whole blocks.
    {"parallel.tp": 2, "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 64},
    {"parallel.cp": 2, "model.num_kv_heads": 2},
)
_TWO_RANKS = {"train.global_batch_size": 4, "train.micro_batch_size": 1}
ONLY_KNOWN_LATE = (
    r"has no GPU|sees no CUDA|needs CUDA|compute capability|NCCL",
    r"on any number of ranks only at equal threads|needs kernels whose result does not depend on timing",
    r"vocabulary|validation|samples|documents|tokens in",
)
"""Refusals of a machine or of data, as far as their class does not say so."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    number: int
    settings: dict[str, Any]
    ranks: int

    @property
    def overrides(self) -> list[str]:
        """As on the command line."""
        return [f"{key}={_written(value)}" for key, value in self.settings.items()]


def _written(value: Any) -> str:
    if isinstance(value, (dict, list)):
        text = re.sub(r"'", "", str(value).replace("True", "true").replace("False", "false"))
        return re.sub(r"([*][^,\]]*)", r"'\1'", text)
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def legal_values(key: Key, draw: random.Random) -> list[Any]:
    """Some values of a key, in random order."""
    fragment = key.fragment
    if key.name in MENU:
        values = list(MENU[key.name])
    elif "enum" in fragment:
        values = list(fragment["enum"])
    else:
        choices = (fragment, *fragment.get("anyOf", ()))
        inner = next((one for one in choices if one.get("type") not in (None, "null")), fragment)
        low, default = inner.get("minimum", inner.get("exclusiveMinimum", 0)), fragment.get("default")
        match inner.get("type"):
            case "boolean":
                values = [True, False]
            case "integer":
                values = [low, low + 1, low + 2, low + 7] + ([2 * default] if default else [])
            case "number":
                values = [low + part for part in (0.0, 1e-3, 0.3, 1.5)] + ([default / 2] if default else [])
            case _:
                values = ["text"] if inner.get("type") == "string" else []
    draw.shuffle(values)
    return values


def make_case(number: int, seed: int, config: Path, two_ranks: float, most: int) -> Case:
    """Draw settings until there are enough that the configuration accepts together."""
    draw = random.Random(f"{seed}/{number}")
    ranks = 2 if draw.random() < two_ranks else 1
    table = key_table()
    keys = [key for key in table.leaves() if key.name not in FIXED]
    by_section: dict[str, list[Key]] = {}
    for key in keys:
        by_section.setdefault(".".join(key.path[:2][: len(key.path) - 1]), []).append(key)
    settings: dict[str, Any] = {}
    if ranks == 2:
        settings = {**_TWO_RANKS, **draw.choice(LAYOUTS)}
    now = accepted(config, Case(number, settings, ranks))
    assert now is not None
    wanted = len(settings) + draw.randint(1, most)
    for _ in range(12 * most):
        if len(settings) >= wanted:
            break
        name = draw.choice(CHOOSERS) if draw.random() < 0.4 else None
        key = table.keys[name] if name else draw.choice(by_section[draw.choice(sorted(by_section))])
        values = legal_values(key, draw)
        if key.name in settings or not values:
            continue
        tried = {**settings, key.name: values[0]}
        then = accepted(config, Case(number, tried, ranks))
        if then is not None and then.config != now.config:  # not what stood there anyway
            settings, now = tried, then
    return Case(number, settings, ranks)


def accepted(config: Path, case: Case) -> ResolvedConfig | None:
    """The configuration, if ``fp8train config --world`` takes it."""
    try:
        resolved = load_config(config, case.overrides)
        check_world(resolved.config, case.ranks, origins=resolved.origins)
    except ConfigError:
        return None
    return resolved


def write_files(folder: Path) -> Path:
    """Random tokens, and the quick start on them; the configuration file."""
    generator = np.random.default_rng(0)
    writer = IndexedDatasetWriter(folder / "text", vocab_size=VOCAB)
    for _ in range(200):
        writer.add_document(generator.integers(VOCAB, size=int(generator.integers(50, 400))))
    writer.finish()
    text: Plain = {
        "base": str(CONFIGURATION),
        "run": {"dir": str(folder), "overwrite": True},
        "model": {"vocab_size": VOCAB, "init_std": None},
        "data": {"prefix": str(folder / "text"), "seq_length": 32, "split": [0.8, 0.2, 0.0]},
        "schedule": {"min_lr_ratio": None},
        "train": {"steps": STEPS, "eval_interval": 0, "eval_batches": None},
        "logging": {"interval": 1, "tensorboard": False},
    }
    path = folder / "run.yaml"
    assert isinstance(text, dict)
    path.write_text(dump_plain(text))
    return path


@dataclass(frozen=True)
class Verdict:
    """What became of a case on one rank: ``ran``, ``late`` (machine or data), ``refused`` or ``crashed``."""

    outcome: str
    text: str = ""


def run_case(group: None, rank: int, world_size: int, config: Path, case: Case) -> Verdict:
    """Runs in the pool."""
    del group, rank, world_size
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), ExitStack() as lifetime:
            status = train_command(config, [*case.overrides, f"run.name=case{case.number}"], lifetime)
        return Verdict("ran") if status == 0 else Verdict("crashed", f"exit status {status}")
    except UserError as error:
        late = isinstance(error, (DataError, NoTargetsError)) or any(
            re.search(pattern, str(error)) for pattern in ONLY_KNOWN_LATE
        )
        return Verdict("late" if late else "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return Verdict("crashed", traceback.format_exc())


_WORST = ("ran", "late", "refused", "crashed")


def judge(pool: GlooPool, config: Path, case: Case) -> Verdict:
    """Train it; the worst verdict of its ranks."""
    try:
        verdicts = pool.run(run_case, case.ranks, config, case, join=False, timeout=TIMEOUT_S)
    except Exception as error:
        return Verdict("crashed", str(error))
    return max(verdicts, key=lambda verdict: _WORST.index(verdict.outcome))


def _one(config: Path, pools: list[GlooPool], case: Case) -> Verdict:
    pool = pools.pop()
    try:
        return judge(pool, config, case)
    finally:
        pools.append(pool)


def report(case: Case, verdict: Verdict, *, full: bool) -> None:
    """Print a finding."""
    lines = verdict.text.strip().splitlines() or [""]
    shown = lines if full else lines[-1:] if verdict.outcome == "crashed" else lines[:1]
    print(f"{verdict.outcome}: case {case.number} on {case.ranks} rank(s): {' '.join(case.overrides)}")
    print("\n".join(f"    {line[:600]}" for line in shown), flush=True)


def main() -> int:
    """Draw, train, report; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one case, shown in full")
    parser.add_argument("--settings", type=int, default=MOST_SETTINGS, help="most random settings of a case")
    parser.add_argument("--two-ranks", type=float, default=0.25, help="share on two processes")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="train.compile: block too (slow)")
    args = parser.parse_args()
    if args.compile:
        MENU["train.compile"] = ("off", "block")
    began, found, told = time.monotonic(), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="fuzz-config-") as folder, contextlib.ExitStack() as stack:
        config = write_files(Path(folder))
        numbers = range(args.count) if args.only is None else [args.only]
        cases = [make_case(n, args.seed, config, args.two_ranks, args.settings) for n in numbers]
        print(f"{len(cases)} configurations drawn in {time.monotonic() - began:.0f} s", flush=True)
        pools = [GlooPool() for _ in range(args.jobs)]
        for pool in pools:
            stack.callback(pool.close)
        with ThreadPoolExecutor(args.jobs) as threads:
            for case, verdict in zip(
                cases, threads.map(lambda c: _one(config, pools, c), cases), strict=True
            ):
                found[verdict.outcome] += 1
                told += verdict.outcome in ("refused", "crashed")
                if verdict.outcome != "ran" or args.only is not None:
                    report(case, verdict, full=args.only is not None)
    counts = ", ".join(f"{found[name]} {name}" for name in _WORST)
    print(f"{counts}; {time.monotonic() - began:.0f} s")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
