"""What ``optimizer.clip_grad_norm: 1.0`` means in each parametrisation, measured over widths and depths.

The norm that is logged and clipped is that of the gradients of effective weights
(:meth:`fp8train.models.parametrization.Parametrization.norm_weight`): those of a model with the same matrices
and no multipliers beside them. How close it is to the norm of a *standard* model trained as long is a
question to measurement, which this tool answers: it trains Llamas of every shape in FP32 on the bytes of the
Python standard library, unclipped, under each parametrisation, and prints for each

* ``norm``: the logged norm, a geometric mean over the steps after the first third,
* ``ratio``: over the standard parametrisation's (``init_std = width^-0.5``, learning rate ~ 1 / width); 1 is
  what a threshold needs to mean the same, and what matters most is that it is the same in all rows,
* ``range``: of the ratio of single steps,
* ``clipped``: the share of these steps whose norm is above 1,
* ``unweighted``: the norm of the gradients as they are stored (divided by S if they are true ones), over the
  standard one's: what was clipped without the weights.

    python tools/clip_units.py --json tools/bench/results/clip_units_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, geometric_mean

import torch
from torch import Tensor

from fp8train.comm.collectives import alone
from fp8train.comm.processes import Processes
from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import Config
from fp8train.step.trainer import Trainer

RATES = {"standard": 0.192, "mus": 0.125, "unit_scaling": 0.125, "umup": 1.0}
"""Learning rates; that of ``standard`` is divided by the width."""
SHAPES = ("64x2", "128x2", "256x2", "512x2", "128x4", "128x8")
VOCABULARY, SEQUENCES, LENGTH, HEAD_DIM = 256, 8, 64, 32


@dataclass(frozen=True)
class Result:
    """One run: see the module. ``norms`` and ``unweighted_norms`` are of every step."""

    kind: str
    width: int
    layers: int
    loss: float
    norm: float
    ratio: float
    lowest: float
    highest: float
    clipped: float
    unweighted: float
    norms: list[float]
    unweighted_norms: list[float]


def config_of(kind: str, width: int, layers: int, steps: int) -> Config:
    """A run of a Llama without FP8 and without clipping."""
    heads = width // HEAD_DIM
    model = {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "ffn_hidden_size": 3 * width,
        "vocab_size": VOCABULARY,
        "init_std": width**-0.5,
    }
    mapping = {
        "model": model,
        "data": {"prefix": "unused", "seq_length": LENGTH},
        "optimizer": {"lr": RATES[kind] / (width if kind == "standard" else 1), "clip_grad_norm": 0.0},
        "schedule": {"warmup_steps": steps // 10},
        "train": {"steps": steps, "global_batch_size": SEQUENCES, "micro_batch_size": SEQUENCES},
        "precision": {"level": "O0", "compute": "fp32"},
        "parametrization": {"kind": kind},
        "logging": {"cast_statistics_interval": 0},
    }
    return resolve_mapping(mapping).config


def batches(steps: int) -> list[Tensor]:
    """int64 [1, SEQUENCES, LENGTH + 1] for each step, the same for all runs."""
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(
        len(text) - LENGTH, (steps, 1, SEQUENCES, 1), generator=torch.Generator().manual_seed(1)
    )
    return list(tokens[starts + torch.arange(LENGTH + 1)])


def train(kind: str, width: int, layers: int, data: Sequence[Tensor]) -> tuple[list[float], ...]:
    """(losses, logged norms, norms without weights) of every step."""
    processes = Processes(torch.device("cpu"), 1, 0, alone(), None)
    trainer = Trainer(config_of(kind, width, layers, len(data)), processes, vocab_size=VOCABULARY)
    rule = trainer.model.parametrization
    unscale = 1 / rule.gradient_scale if rule.true_gradients else 1.0
    losses, norms, unweighted = [], [], []
    for step, tokens in enumerate(data):
        result = trainer.step(step, tokens)
        losses.append(float(result.loss))
        norms.append(result.grad_norm)
        unweighted.append(float(trainer.store.global_norm()) * unscale)
    return losses, norms, unweighted


def measure(width: int, layers: int, data: Sequence[Tensor]) -> list[Result]:
    """All parametrisations of one shape."""
    first, results, standard = len(data) // 3, [], None
    for kind in RATES:
        losses, norms, unweighted = train(kind, width, layers, data)
        standard = norms if standard is None else standard
        ratios = [a / b for a, b in zip(norms, standard, strict=True)][first:]
        results.append(
            Result(
                kind=kind,
                width=width,
                layers=layers,
                loss=fmean(losses[-len(losses) // 5 :]),
                norm=geometric_mean(norms[first:]),
                ratio=geometric_mean(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                clipped=fmean(norm > 1 for norm in norms[first:]),
                unweighted=geometric_mean(unweighted[first:]) / geometric_mean(standard[first:]),
                norms=norms,
                unweighted_norms=unweighted,
            )
        )
    return results


def row(result: Result) -> str:
    """A line of the table."""
    return (
        f"| {result.width} | {result.layers} | {result.kind:12} | {result.loss:.2f} | {result.norm:.2f} "
        f"| {result.ratio:.2f} | {result.lowest:.2f} to {result.highest:.2f} | {result.clipped:.0%} "
        f"| {result.unweighted:.3g} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="WIDTHxLAYERS")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, results = batches(args.steps), []
    print("| width | layers | kind | loss | norm | ratio | range | clipped | unweighted |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        width, layers = map(int, shape.split("x"))
        for result in measure(width, layers, data):
            print(row(result), flush=True)
            results.append(result)
    if args.json is not None:
        outcomes = {"torch": torch.__version__, "steps": args.steps, "runs": [asdict(r) for r in results]}
        args.json.write_text(json.dumps(outcomes, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
