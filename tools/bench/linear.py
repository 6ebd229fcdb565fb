"""Forward and backward of one linear: BF16, ours in FP8, and torchao's float8 training, on a GPU.

    python tools/bench/linear.py --json out.json
    python tools/bench/linear.py --tiny --device cpu

Shapes are those of ``tools/bench/gemm.py``. All compute ``[M, K] x [K, N]`` and both gradients, in BF16 or in
FP8 with one scale per tensor from the tensor's own amax. torchao casts the weight in every forward, ours once
per optimizer step: its cast is timed by ``gemm.py``. torchao is meant to be compiled: ``--compile`` adds it.
Where torchao cannot be imported it is left out, which the result says.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gemm import ROTATED, shapes
from measure import Results, print_table, time_calls
from torch import nn

from fp8train.comm.processes import choose_device
from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.layers.linear import Linear
from fp8train.layers.linear_plan import Fp8Plan
from fp8train.precision.linear_gemms import LinearQuant

MODELS = ("8B", "3B", "1B")


def ours(k: int, n: int, device: torch.device) -> nn.Module:
    """A linear of the package, with the quantisation of ``precision.gemm.fp8``."""
    layer = Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
    nn.init.normal_(layer.weight, std=0.02)
    plan = Fp8Plan(LinearQuant(), choose_gemm_backend(device, torch.bfloat16))
    layer.connect(plan=plan, weight=layer.make_fp8_weight(plan, scale_state=None, recorder=None))
    return layer


def bf16(k: int, n: int, device: torch.device) -> nn.Module:
    """Torch's own."""
    layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def torchao(k: int, n: int, device: torch.device) -> nn.Module:
    """Torchao's, as its default recipe makes it."""
    from torchao.float8 import convert_to_float8_training

    converted: nn.Module = convert_to_float8_training(nn.Sequential(bf16(k, n, device)))
    return converted


def torchao_compiled(k: int, n: int, device: torch.device) -> nn.Module:
    """The same, compiled."""
    torch.compiler.reset()  # torch gives up after eight versions of one module
    compiled: nn.Module = torch.compile(torchao(k, n, device), dynamic=False)  # type: ignore[assignment]
    return compiled


def step_of(layer: nn.Module, m: int, k: int, n: int, device: torch.device, seed: int) -> Callable[[], None]:
    """Forward and backward on tensors of its own."""
    generator = torch.Generator(device).manual_seed(seed)
    x, grad = (torch.randn(m, size, generator=generator, device=device).to(torch.bfloat16) for size in (k, n))
    x.requires_grad_()
    weights = list(layer.parameters())

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *weights], grad)

    return step


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torchao compiled, too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this time")
    parser.add_argument("--tiny", action="store_true", help="two small shapes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start, device = time.monotonic(), choose_device(args.device, 0)
    kinds: dict[str, Callable[[int, int, torch.device], nn.Module]] = {"bf16": bf16, "ours": ours}
    has_torchao = importlib.util.find_spec("torchao") is not None
    if has_torchao:
        kinds["torchao"] = torchao
        if args.compile:
            kinds["torchao_compiled"] = torchao_compiled
    results = Results(args.json, device, torchao=has_torchao)
    chosen = shapes(tiny=args.tiny)
    if not args.tiny:
        chosen = [
            (name, m, k, n) for wanted in MODELS for name, m, k, n in chosen if (name, m) == (wanted, 8192)
        ]
    table = []
    for name, m, k, n in chosen:
        row: dict[str, float | None] = {}
        for kind, make in kinds.items():
            if time.monotonic() - start > args.seconds:
                print(f"{name} {m} x {k} x {n}, {kind}: no time left", file=sys.stderr)
                continue
            try:
                layer = make(k, n, device)
                steps = [step_of(layer, m, k, n, device, seed) for seed in range(ROTATED)]
                row[kind] = time_calls(steps, device, repeats=args.repeats).median
            except Exception as error:  # torchao's and the compiler's have types of their own
                results.fail(f"{name} {m} x {k} x {n}, {kind}: {type(error).__name__}: {str(error)[:500]}")
        results.add(name=name, m=m, k=k, n=n, seconds=row)
        base = row.get("bf16")
        cells = ["-" if base is None or not row.get(kind) else f"{base / row[kind]:.2f}" for kind in kinds]
        table.append((f"{name} {m} x {k} x {n}", "-" if base is None else f"{base * 1e6:.0f}", *cells[1:]))
    if table:
        print_table(("M x K x N", "BF16 us", *(f"{kind}, times faster" for kind in list(kinds)[1:])), table)
    if not has_torchao:
        print("torchao cannot be imported here: ours alone")
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
