"""What accumulation in few bits costs a forward GEMM, by K, beside what casting to FP8 costs it; a model.

    python tools/bench/fast_accumulation.py --json out.json

The accumulators are those of :mod:`fp8train.kernels.fast_accumulation`; nothing here runs on tensor cores.
Operands are random: ``normal`` ones have sums that hover around zero, ``uniform`` ones in [0, 1) grow with K
and have the largest error that truncation can make. Errors are relative, over all outputs, and against FP64:

* ``cast``: of the product of the FP8 codes, one scale per tensor, to that of the values before the cast.
* ``fast``: of the sum in 14 bits, to the product of the codes; ``largest``: of one output.
* ``promoted``: likewise, where 128 elements of K at a time go to FP32 (no fast accumulation).
* ``output``: of the exact sum rounded to BF16, which follows in any case.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from measure import Results, print_table
from torch import Tensor

from fp8train.kernels.fast_accumulation import accumulate
from fp8train.numerics.cast import quantize
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec

DEPTHS = (512, 1024, 2048, 4096, 8192, 16384)


def operands(kind: str, size: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BF16 values [size, K] and [K, size]."""
    make = torch.randn if kind == "normal" else torch.rand
    x, weight = (make(shape, generator=generator) for shape in ((size, k), (k, size)))
    return x.bfloat16(), weight.bfloat16()


def relative(found: Tensor, truth: Tensor) -> float:
    """Root of the summed squares of the error over that of the truth."""
    return float((found.double() - truth).norm() / truth.norm())


def errors(kind: str, size: int, k: int, seed: int) -> dict[str, float]:
    """The errors of one GEMM."""
    x, weight = operands(kind, size, k, torch.Generator().manual_seed(seed))
    (a, scale_a), (b, scale_b) = (quantize(t, QuantSpec(E4M3)) for t in (x, weight))
    exact = a.double() @ b.double()
    fast, promoted = accumulate(a, b), accumulate(a, b, fast=False)
    worst = (fast.double() - exact).abs().max() / exact.abs().mean()
    return {
        "cast": relative(exact * scale_a.double() * scale_b.double(), x.double() @ weight.double()),
        "fast": relative(fast, exact),
        "largest": float(worst),
        "promoted": relative(promoted, exact),
        "output": relative(exact.bfloat16(), exact),
    }


def main() -> int:
    """Compute and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64, help="M and N")
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="K")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = Results(args.json, torch.device("cpu"))
    for kind in ("normal", "uniform"):
        for k in args.depths:
            results.add(operands=kind, k=k, **errors(kind, args.size, k, args.seed))
    names = ("cast", "fast", "largest", "promoted", "output")
    rows = [(row["operands"], str(row["k"]), *(f"{row[name]:.2e}" for name in names)) for row in results.rows]
    print_table(("operands", "K", *names), rows)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
