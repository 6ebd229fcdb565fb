"""What ``tools/bench/count_step.py`` counts of the steps that ``train_step.py`` measures, kept in a file.

Counting needs no GPU, but time on a CPU: it is done before, elsewhere, and its file is brought along.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from step_arguments import Point, overrides_of, points_of

from tools.bench.ceilings import GPUS
from tools.bench.count_step import Model, count, resolve


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


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """What is counted of every variant at every point, by :func:`prediction_key`.

    The optimizer's work does not depend on the tokens: it is counted once.
    """
    found: dict[str, Any] = {}
    for name in args.chosen:
        update: list[tuple[int, float]] = []
        for place in {(point.micro_batch, point.seq): None for point in points_of(args)}:
            overrides = overrides_of(args, name, *place)
            models = [
                count(resolve(args.config, overrides, layers), GPUS[args.predict], optimizer=not update)
                for layers in (1, 2)
            ]
            if not update:
                rows = [model.counts.total(phase="optimizer") for model in models]
                update = [(row.launches, row.seconds) for row in rows]
                added = [(0, 0.0), (0, 0.0)]
            else:
                added = update

            def value(model: Model, more: tuple[int, float]) -> dict[str, float]:
                row = model.counts.total()
                syncs = sum(model.counts.syncs.values())
                launches, seconds = row.launches + more[0], row.seconds + more[1]
                return {"seconds": seconds, "launches": launches, "peak_bytes": model.peak, "syncs": syncs}

            one, two = (value(model, more) for model, more in zip(models, added, strict=True))
            optimizer = [seconds for _, seconds in update]
            one["optimizer_seconds"], two["optimizer_seconds"] = optimizer
            for point in points_of(args):
                if (point.micro_batch, point.seq) == place:
                    said = {key: one[key] + (point.layers - 1) * (two[key] - one[key]) for key in one}
                    found[prediction_key(args.config.name, name, point)] = said
                    print(prediction_key(args.config.name, name, point), said, flush=True)
    return found
