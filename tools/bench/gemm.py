"""GEMMs in BF16 and FP8 with the casts that FP8 needs, over shapes: below which size FP8 loses.

    python tools/bench/gemm.py --json out.json
    python tools/bench/gemm.py --tiny --device cpu

Of a linear ``[M, K] x [K, N]`` four things are timed, on the device alone:

* ``bf16``: ``torch.mm``.
* ``fp8``: the scaled matmul of operands that are there already, one scale per tensor.
* ``cast and fp8``: both operands cast, then multiplied.
* ``training``: the three GEMMs of forward and backward. In FP8 with the casts of input and output gradient,
  both in both layouts; the weight is cast once per optimizer step, so it is left out (``cast_weight`` is its
  time).

The rule for ``precision.gemm.min_dim`` follows from ``training``: the smallest size from which on FP8 wins at
every measured shape with ``min(K, N)`` of that size or more. It holds for linears that cast with fused
operations; a norm or an activation that casts in its own pass costs less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Results, print_table, time_calls
from torch import Tensor

from fp8train.comm.processes import choose_device
from fp8train.kernels.gemm import scaled_mm
from fp8train.kernels.operands import CastOperand, CastRule, amax_partials, cast_operand
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec

X, GRADIENT = CastRule.of(QuantSpec(E4M3)), CastRule.of(QuantSpec(E5M2))
MODELS = {
    "1B": ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)),
    "3B": ((3072, 5120), (3072, 3072), (3072, 16384), (8192, 3072)),
    "8B": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
}
"""(K, N) of a block's linears: query, key and value together; attention's output; up and gate; down."""
SQUARES = (256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560)
TOKENS = (2048, 8192, 16384)
ROTATED = 3  # sets of operands


def shapes(*, tiny: bool) -> list[tuple[str, int, int, int]]:
    """(name, M, K, N), the most informative first: those of models at the usual number of tokens."""
    if tiny:
        return [("square", 32, size, size) for size in (32, 64)]
    found = []
    for m in sorted(TOKENS, key=lambda m: m != 8192):
        found += [(name, m, k, n) for name, sizes in MODELS.items() for k, n in sizes]
        found += [("square", m, size, size) for size in SQUARES]
    return found


def cast(x: Tensor, rule: CastRule, *, straight: bool = True, turned: bool = True) -> CastOperand:
    """An operand with its own scale."""
    return cast_operand(x, amax_partials(x), rule, straight=straight, turned=turned)


def product(a: Tensor, b_turned: Tensor, one: CastOperand, other: CastOperand) -> Tensor:
    """``a @ b`` in BF16, of codes that lie as tensor cores read them."""
    return scaled_mm(a, b_turned.t(), one.scale_inv, other.scale_inv, out_dtype=torch.bfloat16)


def calls(m: int, k: int, n: int, device: torch.device, seed: int) -> dict[str, Callable[[], object]]:
    """What is timed, on operands of its own."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

    x, weight, grad = random(m, k), random(n, k), random(m, n)
    x8, w8 = cast(x, X), cast(weight, X)

    def cast_and_multiply() -> Tensor:
        a, b = cast(x, X, turned=False), cast(weight, X, turned=False)
        return product(a.codes, b.codes, a, b)

    def train_bf16() -> None:
        torch.mm(x, weight.t())
        torch.mm(grad, weight)
        torch.mm(grad.t(), x)

    def train_fp8() -> None:
        a = cast(x, X)
        product(a.codes, w8.codes, a, w8)
        g = cast(grad, GRADIENT)
        product(g.codes, w8.turned, g, w8)
        product(g.turned, a.turned, g, a)

    return {
        "bf16": lambda: torch.mm(x, weight.t()),
        "fp8": lambda: product(x8.codes, w8.codes, x8, w8),
        "cast_and_fp8": cast_and_multiply,
        "training_bf16": train_bf16,
        "training_fp8": train_fp8,
        "cast_weight": lambda: cast(weight, X),
    }


def measure(m: int, k: int, n: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    sets = [calls(m, k, n, device, seed) for seed in range(ROTATED)]
    return {name: time_calls([one[name] for one in sets], device, repeats=repeats).median for name in sets[0]}


def crossover(rows: Sequence[dict[str, Any]]) -> int | None:
    """The smallest measured ``min(K, N)`` from which on FP8 wins in training everywhere; None: nowhere."""
    by_size: dict[int, bool] = {}
    for row in rows:
        size = min(row["k"], row["n"])
        by_size[size] = by_size.get(size, True) and row["training_fp8"] < row["training_bf16"]
    found = None
    for size in sorted(by_size, reverse=True):
        if not by_size[size]:
            break
        found = size
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = []
    for row in rows:
        flops = 2 * row["m"] * row["k"] * row["n"]
        table.append(
            (
                f"{row['name']} {row['m']} x {row['k']} x {row['n']}",
                f"{flops / row['bf16'] / 1e12:.4g}",
                f"{flops / row['fp8'] / 1e12:.4g}",
                f"{row['bf16'] / row['fp8']:.2f}",
                f"{row['bf16'] / row['cast_and_fp8']:.2f}",
                f"{row['training_bf16'] / row['training_fp8']:.2f}",
            )
        )
    header = ("M x K x N", "BF16 TFLOP/s", "FP8 TFLOP/s", "speed-up", "with both casts", "training")
    print_table(header, table)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after this time")
    parser.add_argument("--tiny", action="store_true", help="two small shapes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start, device = time.monotonic(), choose_device(args.device, 0)
    results = Results(args.json, device)
    for name, m, k, n in shapes(tiny=args.tiny):
        if time.monotonic() - start > args.seconds:
            results.fail(f"{name} {m} x {k} x {n} and what follows: no time left of {args.seconds:g} s")
            break
        try:
            results.add(name=name, m=m, k=k, n=n, **measure(m, k, n, device, args.repeats))
        except RuntimeError as error:
            results.fail(f"{name} {m} x {k} x {n}: {str(error)[:500]}")
    show(results.rows)
    rules = {}
    for m in sorted({row["m"] for row in results.rows}):
        rules[str(m)] = crossover([row for row in results.rows if row["m"] == m])
        print(f"{m} tokens: FP8 wins in training from min(K, N) = {rules[str(m)]} on")
    return results.finish(min_dim=rules)


if __name__ == "__main__":
    sys.exit(main())
