#!/usr/bin/env python
"""Do the tests notice? Puts one known fault at a time into a copy of the checkout; some test must fail there.

    python tools/mutants.py                # all: a table of killed and survived; status 1 if one survives
    python tools/mutants.py slack order    # those whose names contain one of the words
    python tools/mutants.py --list

A mutant is a piece of source text and what replaces it, so short that it survives a reformat; a text that is
not there exactly once makes the mutant *stale*, which fails too. Mutants with the same tests run against one
copy, after these tests have passed on it unchanged: a test that fails anyway kills nothing (*not judged*).
The copy has no ``.git`` and no ``.venv``; the tests run with this interpreter and ``PYTHONPATH`` set to it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUTH = "tests/truth/test_truth.py"


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        name: what is wrong.
        file: relative to the checkout.
        old: text that occurs once.
        new: what replaces it.
        tests: arguments to pytest; one of the tests they select must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _truth(words: str) -> tuple[str, ...]:
    """The quick truth tests whose names match."""
    return (TRUTH, "-m", "not slow", "-k", words)


def _recorded(words: str) -> tuple[str, ...]:
    return ("tests/step/test_recorded.py", "-k", words)


_RECORDED = "fp8train/step/recorded.py"
_TRAINER, _OPTIMIZER = "fp8train/step/trainer.py", "fp8train/optim/optimizer.py"
_BASE_TRAINER = "fp8train/step/base_trainer.py"
_GRADIENTS = "fp8train/parallel/gradients/"
_STORE, _GRIDS, _BLOCKS = (f"{_GRADIENTS}{name}.py" for name in ("store", "grids", "block_storage"))

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "slack: the grid of squares is made for the FP32 amax",
        _GRIDS,
        "_AMAX_SLACK = 1 + 2.0**-20",
        "_AMAX_SLACK = 1",
        ("tests/truth/test_exact_grid.py",),
    ),
    Mutant(
        "order: buckets are launched as they were opened",
        f"{_GRADIENTS}bucket_plan.py",
        "groups.sort(key=",
        "(lambda key: None)(key=",
        ("tests/truth/test_launch_order.py",),
    ),
    Mutant(
        "order: groups of the pipeline are ignored",
        f"{_GRADIENTS}bucket_plan.py",
        "(parameters[group[1][-1]].group, group[1][-1])",
        "group[1][-1]",
        ("tests/truth/test_launch_order.py",),
    ),
    Mutant(
        "clipping: gradients are applied unclipped",
        _OPTIMIZER,
        "* multiplier)\n            # The rule",
        "* 1.0)\n            # The rule",
        _truth("O2 and 8 and micro"),
    ),
    Mutant(
        "clipping: the threshold is twice as high",
        "fp8train/optim/clipping.py",
        "(max_norm / norm).clamp(max=1.0)",
        "(2 * max_norm / norm).clamp(max=1.0)",
        _truth("O2 and 8 and micro"),
    ),
    Mutant(
        "loss: every rank divides by its own tokens",
        _BASE_TRAINER,
        "return targets.numel() * self.processes.replicas.size",
        "return targets.numel()",
        _truth("O2 and 4 and ranks"),
    ),
    Mutant(
        "gradient scale of mus is not divided out",
        _BASE_TRAINER,
        "1 / rule.gradient_scale if rule.true_gradients else 1.0",
        "1.0",
        _truth("recipe and mus"),
    ),
    Mutant(
        "exchange: the sum of the parts is twice too large",
        "fp8train/kernels/exchange_sum.py",
        "total.add_(values) if rank",
        "total.add_(2 * values) if rank",
        _truth("O1 and 2 and ranks"),
    ),
    Mutant(
        "micro-batches: the first of a step does not overwrite",
        f"{_GRADIENTS}wide_storage.py",
        "        if first:\n            view.copy_(gradient)",
        "        if False:\n            view.copy_(gradient)",
        _truth("O0 and 8 and micro"),
    ),
    Mutant(
        "moments: the second one takes the gradient's size, not its square",
        "fp8train/update_rules/adamw.py",
        "addcmul_(gradient, gradient, value=1 - s.beta2)",
        "add_(gradient.abs(), alpha=1 - s.beta2)",
        _truth("O2 and 8 and micro"),
    ),
    Mutant(
        "master weights are rounded to BF16 on the way",
        _OPTIMIZER,
        "store(start, stop, values, keys[role])",
        "store(start, stop, values.bfloat16().to(values.dtype), keys[role])",
        _truth("O0 and 8 and micro"),
    ),
    Mutant(
        "skipped steps move scale state and residuals",
        _TRAINER,
        "        if not skipped:\n            self.store.commit(clip)",
        "        if True:\n            self.store.commit(None)",
        _truth("feedback or paper"),
    ),
    Mutant(
        "exact: sums are read on the next step's grid",
        _GRIDS,
        "self.step.agree(self._group, self._numels, self._contributions)",
        "self.step.agree(self._group, self._numels, self._contributions)\n"
        "        self.commit()\n        self.step.exponents.copy_(self._next().exponents)",
        _truth("exact and 8 and micro"),
    ),
    Mutant(
        "exact: a step without an amax counts as a calibration",
        _GRIDS,
        "(largest == 0) | outgrown",
        "(self._history[0] < 0) | outgrown & (largest > 0)",
        _truth("exact and first"),
    ),
    Mutant(
        "exact: gradients that outgrow their grid saturate",
        _GRIDS,
        "(largest == 0) | outgrown | (amax < largest * fall)",
        "(largest == 0) | (amax < largest * fall)",
        _truth("exact and 8 and micro"),
    ),
    Mutant(
        "exact: gradients far below their grid are flushed",
        _GRIDS,
        "(largest == 0) | outgrown | (amax < largest * fall)",
        "(largest == 0) | outgrown",
        ("tests/truth/test_edges.py", "-k", "million"),
    ),
    Mutant(
        "error feedback: the residual is not clipped",
        _BLOCKS,
        "            if clip is None:",
        "            if True:",
        _truth("feedback"),
    ),
    Mutant(
        "error feedback: the residual is written at the cast",
        _BLOCKS,
        "lost=None if self._lost is None else self._lost[rows],",
        "lost=residual,",
        _truth("feedback"),
    ),
    Mutant(
        "released gradients: weights change while backward may read them",
        f"{_GRADIENTS}release.py",
        "return self._plan[bucket].parts[1] < part",
        "return True",
        ("tests/step/test_gradient_release.py", "-k", "no_weight"),
    ),
    Mutant(
        "released gradients: ranks judge alone",
        f"{_GRADIENTS}release.py",
        "if self._agree is not None and self._agree.size > 1:",
        "if False:",
        ("tests/distributed/test_gradient_release.py", "-k", "halfway and True"),
    ),
    Mutant(
        "released gradients: what pads a bucket is another's",
        _BLOCKS,
        "        if self._refills:",
        "        if False:",
        ("tests/step/test_gradient_release.py", "-k", "ragged"),
    ),
    Mutant(
        "states in host memory: a slot is filled before it is empty",
        "fp8train/optim/host_states.py",
        'self._queues.wait("in", self._free[slot])',
        "pass",
        ("tests/step/test_offload.py", "-k", "bits_of_one and O3"),
    ),
    Mutant(
        "states in host memory: what was fetched ahead outlives a checkpoint that is loaded",
        "fp8train/optim/host_states.py",
        "self._fetched = [None] * SLOTS  # what is in slots may be old by the next visit",
        "pass",
        ("tests/step/test_offload.py", "-k", "loaded_states"),
    ),
    Mutant(
        "states in host memory: rows of a piece read another's gradient",
        "fp8train/optim/optimizer.py",
        "return PartOfGradient(whole, start) if start else whole",
        "return whole",
        ("tests/step/test_offload.py", "-k", "bits_of_one and O0"),
    ),
    Mutant(
        "a step without targets is applied",
        "fp8train/step/verdict.py",
        'skipped = "no_targets"',
        "pass",
        ("tests/truth/test_edges.py", "-k", "without_any_target"),
    ),
    Mutant(
        "two levels, ZeRO: parts lie in rank order",
        f"{_GRADIENTS}receivers.py",
        "return tuple(rank for place in range(node_size) for rank in range(place, ranks, node_size))",
        "return tuple(range(ranks))",
        _truth("nodes and rows"),
    ),
    Mutant(
        "a recording that keeps casts of weights",
        _RECORDED,
        "        self._forget()\n        try:",
        "        try:",
        _recorded("not_forgotten and O1"),
    ),
    Mutant(
        "a guard's linears without a recording of their own",
        "fp8train/step/monitors.py",
        "else frozenset(self.guard.locked)",
        "else frozenset()",
        _recorded("leaves_fp8"),
    ),
    Mutant(
        "what a recorded cast lost is elsewhere",
        _BLOCKS,
        "            self._lost.zero_()",
        "            self._lost = torch.zeros_like(self._lost)",
        _recorded("feedback"),
    ),
)
"""Faults of the past and their neighbours. What tests missed once gets a mutant when it is repaired."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="names and tests, nothing is run")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.words or any(word in m.name for word in options.words)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}\n    {mutant.file}: pytest {' '.join(mutant.tests)}")
        return 0
    if not chosen:
        parser.error("no such mutant; see --list")
    verdicts = []
    for mutant, verdict, test in judged(chosen):
        print(f"{verdict:<10}  {mutant.name:<60}  {test}", flush=True)
        verdicts.append(verdict)
    print(f"{verdicts.count('killed')} of {len(chosen)} killed")
    return 0 if all(verdict == "killed" for verdict in verdicts) else 1


def judged(mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, str, str]]:
    """(mutant, ``killed``, ``survived``, ``stale`` or ``not judged``, the test that failed) of each."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copy = Path(directory) / "checkout"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
        )
        failing: dict[tuple[str, ...], str] = {}
        for mutant in mutants:
            if mutant.tests not in failing:
                failing[mutant.tests] = first_failure(copy, mutant.tests)
            yield mutant, *_judge(copy, mutant, failing[mutant.tests])


def _judge(copy: Path, mutant: Mutant, failing: str) -> tuple[str, str]:
    path = copy / mutant.file
    source = path.read_text() if path.exists() else ""
    if source.count(mutant.old) != 1:
        return "stale", f"its text occurs {source.count(mutant.old)} times in {mutant.file}"
    if failing:
        return "not judged", f"fails without it: {failing}"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        test = first_failure(copy, mutant.tests)
    finally:
        path.write_text(source)
    return ("killed", test) if test else ("survived", "")


def first_failure(copy: Path, tests: Sequence[str]) -> str:
    """The first test that fails in ``copy``, shortened; empty if all pass.

    Raises:
        RuntimeError: pytest ran no test at all.
    """
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:::(.*?))?(?: - .*)?$", done.stdout, re.MULTILINE)
    if found is None or done.returncode not in (1, 2):
        tail = done.stdout[-2000:] + done.stderr[-2000:]
        raise RuntimeError(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{tail}")
    return found[2] or found[1]


if __name__ == "__main__":
    sys.exit(main())
