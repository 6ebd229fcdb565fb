"""What ``tools/bench/count_step.py`` counts of the steps that ``train_step.py`` measures, kept in a file.

Counting needs no GPU, but time on a CPU: it is done before, elsewhere, and its file is brought along.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from step_arguments import Point, overrides_of, points_of

if TYPE_CHECKING:
    from tools.bench.count_step import Model


def prediction_key(config: str, name: str, point: Point) -> str:
    """How a prediction is found again."""
    return f"{config}, {name}, {point.layers} layers, {point.micro_batch} x {point.seq}"


def prediction_of(args: argparse.Namespace, name: str, point: Point) -> dict[str, float] | None:
    """From the file of ``--predictions``; None where it has none."""
    if args.predictions is None:
        return None
    found: dict[str, float] | None = json.loads(args.predictions.read_text())["predicted"].get(
        prediction_key(args.config.name, name, point)
    )
    return found


def predict(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What is counted of every variant at every point, by :func:`prediction_key`."""
    from tools.bench.ceilings import GPUS  # needs the checkout on PYTHONPATH, and is slow to import
    from tools.bench.count_step import count, resolve

    found = {}
    for name in args.chosen:
        for micro_batch, seq in {(point.micro_batch, point.seq): None for point in points_of(args)}:
            overrides = overrides_of(args, name, micro_batch, seq)
            one, two = (
                numbers_of(count(resolve(args.config, overrides, layers), GPUS[args.predict]))
                for layers in (1, 2)
            )
            for point in points_of(args):
                if (point.micro_batch, point.seq) == (micro_batch, seq):
                    said = {key: one[key] + (point.layers - 1) * (two[key] - one[key]) for key in one}
                    key = prediction_key(args.config.name, name, point)
                    found[key] = said
                    print(key, said, flush=True)
    return found


def numbers_of(model: Model) -> dict[str, float]:
    """What is compared with measurements; the optimizer with the weights that it writes."""
    counts, total = model.counts, model.counts.total()
    update = sum(counts.total(phase=phase).seconds for phase in ("optimizer", "weights"))
    return {
        "seconds": total.seconds,
        "optimizer_seconds": update,
        "launches": total.launches,
        "peak_bytes": model.peak,
        "syncs": sum(counts.syncs.values()),
    }
