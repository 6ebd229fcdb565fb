"""What the result files of ``tools/bench/gpu_all.sh`` say, in a screenful.

    python tools/bench/gpu_table.py FOLDER PART...

Exit status 1 if a part has no complete file, or noted a failure.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import print_table


def _tests(result: dict[str, Any]) -> str:
    outcomes = [row["outcome"] for row in result["rows"]]
    return ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)) or "no tests"


def _kernels(result: dict[str, Any]) -> str:
    rows = result["rows"]
    exact = sum(row["small"]["same_bits"] for row in rows)
    text = f"{len(rows)} cases, {exact} with the reference's bits"
    shares = {row["case"]: row["share_of_copy"] for row in rows if "share_of_copy" in row}
    if shares:
        worst = min(shares, key=lambda case: shares[case])
        text += f"; of copy: median {statistics.median(shares.values()):.0%}, {worst} {shares[worst]:.0%}"
    return text


def _gemm(result: dict[str, Any]) -> str:
    rules = ", ".join(f"{m} tokens: {size}" for m, size in result.get("min_dim", {}).items())
    return f"{len(result['rows'])} shapes; FP8 wins in training from min(K, N) on: {rules}"


def _step(result: dict[str, Any]) -> str:
    entries = result.get("variants", [])
    if not entries:
        return f"{len(result['rows'])} measurements"
    longest, most = (max(entry[key] for entry in entries) for key in ("seq_length", "layers"))
    parts = []
    for at in ("micro-batch", "memory"):
        chosen = [e for e in entries if (e["at"], e["seq_length"], e["layers"]) == (at, longest, most)]
        if chosen:
            speeds = ", ".join(f"{e['variant']} {e['ratio_median']:.2f}" for e in chosen)
            parts.append(f"same {at}: {speeds}")
    return f"{longest} tokens, {most} layers, speed; " + "; ".join(parts)


def _optimizer(result: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}: {plan['nanoseconds_per_parameter']:.3g} ns, {plan['share_of_copy']:.0%} of copy"
        for name, plan in result.get("plans", {}).items()
        if name in ("FP32", "O1", "O2")
    )


def _linear(result: dict[str, Any]) -> str:
    kinds = dict.fromkeys(kind for row in result["rows"] for kind in row["seconds"] if kind != "bf16")
    parts = []
    for kind in kinds:
        ratios = [r["seconds"]["bf16"] / r["seconds"][kind] for r in result["rows"] if kind in r["seconds"]]
        parts.append(f"{kind} {statistics.median(ratios):.2f}")
    absent = "" if result.get("torchao") else "; no torchao here"
    return f"median times faster than BF16: {', '.join(parts)}{absent}"


def _profile(result: dict[str, Any]) -> str:
    keys = ("milliseconds", "busy", "launches", "launches_counted", "waits")
    return ", ".join(f"{key} {result.get('summary', {}).get(key)}" for key in keys)


HEADLINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "tests": _tests,
    "kernels": _kernels,
    "gemm": _gemm,
    "step": _step,
    "optimizer": _optimizer,
    "linear": _linear,
    "profile": _profile,
}
"""By the part's name up to its first underscore."""


def line_of(folder: Path, part: str) -> tuple[str, str, str, bool]:
    """(part, state, headline, whether all is well)."""
    file = folder / f"{part}.json"
    if not file.is_file():
        return part, "no result", "", False
    result = json.loads(file.read_text(encoding="utf-8"))
    failures = result.get("failures", [])
    state = "ok" if result["complete"] else "incomplete"
    if failures:
        state += f", {len(failures)} failed"
    headline = HEADLINES[part.partition("_")[0]](result)
    return part, state, headline, bool(result["complete"] and not failures)


def main() -> int:
    """Print the table; a line of each part, then its first failures."""
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    lines = [line_of(folder, part) for part in parts]
    print_table(("part", "state"), [line[:2] for line in lines])
    for part, _, headline, _ in lines:
        if headline:
            print(f"{part}: {headline}")
    for part in parts:
        file = folder / f"{part}.json"
        failures = (
            json.loads(file.read_text())["failures"][:3] if file.is_file() and part != "optimizer" else []
        )
        for failure in failures:
            print(f"FAILED {part}: {failure[:300]}")
    return 0 if all(line[3] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
