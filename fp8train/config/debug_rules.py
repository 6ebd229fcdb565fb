"""What injected faults need of the rest of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from fp8train.config.all_sections import AllSections
from fp8train.config.debug_schema import IN_FORWARD
from fp8train.config.layout import LayoutProblem

_KEY = "debug.fault_injection"


def fault_problems(config: AllSections) -> Iterator[LayoutProblem]:
    """Faults that could never strike in this run, or not as they say."""
    total = config.total_steps
    for fault in config.debug.fault_injection:
        if fault.step > total:
            yield LayoutProblem(
                f"{_KEY}: {fault.kind} is for step {fault.step}, but the run ends with step {total}",
                (_KEY, "train.steps"),
            )
        if fault.phase == "evaluate" and config.train.eval_interval == 0:
            yield LayoutProblem(
                f"{_KEY}: {fault.kind} is for phase: evaluate, but train.eval_interval is 0",
                (_KEY, "train.eval_interval"),
            )
        if fault.kind not in IN_FORWARD:
            continue
        for key, value, off in (
            ("train.compile", config.train.compile, "off"),
            ("run.cuda_graphs", config.run.cuda_graphs, False),
        ):
            if value != off:
                yield LayoutProblem(
                    f"{_KEY}: {fault.kind} changes what a module puts out, but {key} fixes what runs; write "
                    f"{key}: {'false' if off is False else off}",
                    (_KEY, key),
                )
