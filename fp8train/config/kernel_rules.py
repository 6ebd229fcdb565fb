"""What attention, norms, AdamW and gradient norms of other packages allow beside them, as far as the file
alone shows. Casts and products are in :mod:`fp8train.config.te_rules`; devices and versions are checked
elsewhere (:mod:`fp8train.extensions.check`), and so are the shapes of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8train.config.all_sections import AllSections
from fp8train.config.layout import LayoutProblem

_Refusal = tuple[bool, str, Any, str, str]
"""Whether it holds, the key, its value, what to write there, and why."""


def kernel_problems(config: AllSections) -> Iterator[LayoutProblem]:
    """Everything that does not go with ``kernels.attention``, ``.norm``, ``.optimizer`` and
    ``.multi_tensor``."""
    kernels = config.kernels
    in_layers = [("norm", kernels.norm)] if kernels.norm != "auto" else []
    in_layers += [("attention", "te")] if kernels.attention == "te" else []
    for name, value in in_layers:
        yield from _problems(f"kernels.{name}", value, _in_layers(config))
    if kernels.optimizer != "auto":
        yield from _problems("kernels.optimizer", kernels.optimizer, _in_the_step(config))
    if kernels.multi_tensor != "auto":
        yield from _problems("kernels.multi_tensor", kernels.multi_tensor, _in_the_store(config))


def _problems(key: str, value: str, refusals: Iterator[_Refusal]) -> Iterator[LayoutProblem]:
    for holds, other, found, remedy, reason in refusals:
        if holds:
            text = str(found).lower() if isinstance(found, bool) else found
            yield LayoutProblem(
                f"{key}: {value}: {other}: {text} {reason}; write {other}: {remedy}, or {key}: auto",
                (other, key),
            )


def _in_layers(config: AllSections) -> Iterator[_Refusal]:
    compile_, graphs = config.train.compile, config.run.cuda_graphs
    yield compile_ != "off", "train.compile", compile_, "off", "cannot trace its kernels"
    yield graphs, "run.cuda_graphs", graphs, "false", "was never recorded with its kernels"


def _in_the_step(config: AllSections) -> Iterator[_Refusal]:
    name = config.optimizer.name
    yield name != "adamw", "optimizer.name", name, "adamw", "is no rule that its FusedAdam knows"


def _in_the_store(config: AllSections) -> Iterator[_Refusal]:
    gradient = config.precision.gradient
    exact = gradient.format != "high_precision" and gradient.fp8.reduce == "exact"
    reason = "has norms from sums of integers, the same bits on any number of ranks"
    yield exact, "precision.gradient.fp8.reduce", "exact", "exchange", reason
