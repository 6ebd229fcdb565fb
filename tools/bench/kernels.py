"""Every fused operation on a GPU: the same results as its reference, and how fast memory moves.

    PYTHONPATH=. python tools/bench/kernels.py --json out.json
    PYTHONPATH=. python tools/bench/kernels.py --tiny    # on a CPU: a few operations in Triton's interpreter

Each case of ``tools/kernel_cases.py`` is checked twice: in small against the reference on the CPU, and at its
own size against the reference on the GPU. Operations must give the same bits; those that sum along rows, or
take exponentials, may differ by roundings (:data:`ROUNDS`), and are held against FP64 where the reference
takes it. What the operation is to write is filled with NaN before, so that a place it leaves out is seen.

Times are the device's own, of one call, at the case's size, over several sets of arguments in turn (more
bytes than the L2 cache holds). Bytes are the declared cost; the ceiling is a large copy, measured here.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Results, copy_bandwidth, print_table, time_calls
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

ROUNDS = ("residual_norm", "norm_backward", "swiglu", "gelu", "softmax")
"""Names of operations whose results may differ from the reference's by roundings: sums in another order,
exponentials and roots of another library."""
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
CODES_TOLERANCE = 2e-2  # a value that moved by a rounding may fall to the next code, an eighth away
TINY_CASES = ("amax_partials[bf16]", "cast_operand[x]", "residual_norm[rms, amax]")
SMALL, TINY = 128, 1024  # divisors of the cases' rows
INPUT_BYTES = 2**29  # of all sets of arguments together: several times an L2 cache


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written(operation: Any, arguments: Sequence[Any]) -> list[Tensor]:
    """The arguments that the operation writes in place."""
    schema = operation._op._schema.arguments
    marked = [a.alias_info is not None and a.alias_info.is_write for a in schema]
    return tensors_of([argument for argument, mark in zip(arguments, marked, strict=True) if mark])


def results_of(run: Any, operation: Any, arguments: Sequence[Any]) -> list[Tensor]:
    """What a call gives: results, then what it wrote into its arguments, which are copied first. Of the
    optimizer's programs the largest number of each parameter counts, and their sum."""
    own = copied(arguments)
    found = tensors_of(run(*own))
    if operation.name == "optimizer_update":
        largest, flushed = found
        found = [largest.amax(dim=1), flushed.sum(dim=1)]
    return [*found, *written(operation, own)]


def copied(arguments: Sequence[Any], device: torch.device | None = None) -> tuple[Any, ...]:
    """Arguments in other memory, perhaps on another device, with the strides that they have. Addresses in
    int64 tables become those of the copies: a kernel that finds its memory so would write the originals."""
    own = tree_map(lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else x, tuple(arguments))
    pairs = zip(tensors_of(arguments), tensors_of(own), strict=True)
    addresses = {old.data_ptr(): new.data_ptr() for old, new in pairs if old.numel()}
    for table in tensors_of(own):
        if table.dtype == torch.int64:
            values = table.tolist()
            known = tree_map(lambda value: addresses.get(value, value), values)
            if known != values:
                table.copy_(torch.tensor(known))
    return own


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality to the bit; any NaN equals any other."""
    if a.dtype.is_floating_point and a.dtype.itemsize > 1:
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) and bool(
            (torch.signbit(a) == torch.signbit(b))[~a.isnan()].all()
        )
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def relative_error(a: Tensor, b: Tensor) -> float:
    """``‖a - b‖ / ‖b‖`` in FP64; the largest float where only one of them is
    finite."""
    a, b = a.double(), b.double()
    both = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return sys.float_info.max
    norm = torch.linalg.vector_norm(torch.where(both, b, 0.0))
    difference = torch.linalg.vector_norm(torch.where(both, a - b, 0.0))
    return float(difference / norm) if norm else float(difference)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[bool, float, float]:
    """(same bits, largest error over its tolerance, share of elements that differ) of two lists of results.

    Partials are as many as there were programs: of those the largest magnitude counts. FP64 results are
    partial sums: of those the sums count, to 12 digits.
    """
    same, worst, unequal, total = True, 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            assert a.dim() == b.dim() == 1, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
            a, b = a.abs().amax().view(1), b.abs().amax().view(1)
        if a.dtype != b.dtype:
            raise TypeError(f"types {a.dtype} and {b.dtype}")
        a = a.to(b.device)
        total += b.numel()
        if b.dtype == torch.float64 and relative_error(a.sum(-1), b.sum(-1)) < 1e-12:
            continue
        if not b.numel() or same_bits(a, b):
            continue
        same = False
        unequal += (
            int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
            if a.itemsize == 1
            else int((a != b).sum())
        )
        worst = max(worst, relative_error(a, b) / TOLERANCES.get(a.dtype, CODES_TOLERANCE))
    return same, worst, unequal / max(total, 1)


def against_fp64(operation: Any, arguments: Sequence[Any], ours: Sequence[Tensor]) -> float | None:
    """Largest relative error of float results against the reference on FP64 arguments; None where it takes
    none, or gives codes only."""
    wide = tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.itemsize > 1 else x,
        tuple(arguments),
    )
    try:
        true = results_of(operation.reference, operation, wide)
    except Exception:  # made for narrower types, in whatever way it says so
        return None
    errors = [
        relative_error(a.to(b.device), b)
        for a, b in zip(ours, true, strict=True)
        if a.shape == b.shape and a.numel() and a.is_floating_point() and a.itemsize > 1
    ]
    return max((error for error in errors if math.isfinite(error)), default=None)


def poison(like: Sequence[Tensor], device: torch.device) -> None:
    """Leave NaN in memory that results are likely to be given next."""
    blocks = [torch.full((max(1, t.nbytes),), 255, dtype=torch.uint8, device=device) for t in like]
    del blocks


def check(case: Any, operation: Any, run: Any, device: torch.device, scale: int) -> dict[str, Any]:
    """Compare with the reference on the CPU, in small; at full size where the case cannot be made smaller."""
    for divisor in dict.fromkeys((scale, 1)):
        arguments = case.filled(torch.device("cpu"), scale=divisor)
        try:
            expected = results_of(operation.reference, operation, arguments)
            break
        except (RuntimeError, AssertionError, ValueError):
            if divisor == 1:
                raise
    there = copied(arguments, device)
    poison(expected, device)
    ours = results_of(run, operation, there)
    same, worst, share = difference([t.cpu() for t in ours], expected)
    error = None if same else against_fp64(operation, arguments, [t.cpu() for t in ours])
    return {"same_bits": same, "error_over_tolerance": worst, "share_unequal": share, "error_fp64": error}


def check_at_full_size(case: Any, operation: Any, device: torch.device) -> dict[str, Any]:
    """Compare with the reference on the GPU."""
    arguments = case.filled(device)
    expected = results_of(operation.reference, operation, arguments)
    poison(expected, device)
    ours = results_of(operation, operation, arguments)
    same, worst, share = difference(ours, expected)
    return {"same_bits": same, "error_over_tolerance": worst, "share_unequal": share}


def measure(
    case: Any, operation: Any, device: torch.device, repeats: int, bandwidth: float
) -> dict[str, Any]:
    """Time of a call at the case's size, and what it makes of the memory's bandwidth."""
    first = case.filled(device)
    size = max(1, sum(t.nbytes for t in tensors_of(first)))
    copies = max(1, min(8, INPUT_BYTES // size))
    sets = [
        first,
        *(copied(first) for _ in range(copies)),
    ]
    cost = operation.cost(first, operation(*first))
    timing = time_calls([lambda a=a: operation(*a) for a in sets], device, repeats=repeats)
    eager = time_calls([lambda: operation.reference(*first)], device, repeats=3, warmup=1)
    rate = cost.moved / timing.median
    return {
        "launches": cost.launches,
        "bytes": cost.moved,
        "seconds": timing.median,
        "seconds_range": [min(timing.seconds), max(timing.seconds)],
        "bytes_per_second": rate,
        "share_of_copy": rate / bandwidth,
        "seconds_of_reference": eager.median,
    }


def verdict(case: Any, rounds: bool, found: dict[str, Any]) -> str | None:
    """What is wrong with a comparison; None if nothing is."""
    if found["same_bits"] or (rounds and found["error_over_tolerance"] <= 1):
        return None
    rule = "its tolerance" if rounds else "none (the same bits are asked for)"
    return (
        f"{case}: {found['share_unequal']:.2%} of the results differ, "
        f"error over tolerance {found['error_over_tolerance']:.3g}, allowed: {rule}"
    )


def examine(
    case: Any, operation: Any, args: argparse.Namespace, device: torch.device, bandwidth: float
) -> Any:
    """One case's row, and what is wrong with it."""
    rounds = case.operation.startswith(ROUNDS)
    on_gpu = device.type == "cuda"
    run = operation if on_gpu else operation.launch
    row: dict[str, Any] = {"case": str(case), "exact": not rounds}
    row["small"] = check(case, operation, run, device, args.small)
    problems = [verdict(case, rounds, row["small"])]
    if on_gpu:
        row["full"] = check_at_full_size(case, operation, device)
        # the reference on a GPU sums in an order of its own, and has exponentials of its own
        problems.append(verdict(f"{case}, full size", rounds, row["full"]))
        row |= measure(case, operation, device, args.repeats, bandwidth)
        torch.cuda.empty_cache()
    return row, [problem for problem in problems if problem is not None]


def _expired(*_: object) -> None:
    raise TimeoutError("took longer than --patience")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = []
    for row in rows:
        small, full = row["small"], row.get("full", {})
        checks = "/".join(
            "bits" if c["same_bits"] else f"{c['error_over_tolerance']:.2g}" for c in (small, full) if c
        )
        fp64 = "-" if small["error_fp64"] is None else f"{small['error_fp64']:.1e}"
        numbers = ["-"] * 4
        if "seconds" in row:
            numbers = [
                f"{row['seconds'] * 1e6:.0f}",
                f"{row['bytes_per_second'] / 1e12:.2f}",
                f"{row['share_of_copy']:.0%}",
                f"{row['seconds_of_reference'] / row['seconds']:.1f}",
            ]
        table.append((row["case"], checks, fp64, *numbers))
    print_table(("case", "equal", "err FP64", "us", "TB/s", "of copy", "x eager"), table)


def main() -> int:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--after", default="", help="go on with the file, after this case")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--patience", type=int, default=0, help="seconds for one case; 0: as it takes")
    parser.add_argument(
        "--small", type=int, default=SMALL, help=f"divisor of the rows of small checks ({SMALL})"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this time")
    parser.add_argument("--tiny", action="store_true", help="three cases on the CPU, in the interpreter")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGALRM, _expired)
    if args.tiny:
        args.device, args.small = "cpu", TINY
    os.environ["TRITON_INTERPRET"] = str(int(args.device == "cpu"))  # read when Triton is imported
    from fp8train.kernels.fused_op import OPERATIONS
    from tools.kernel_cases import cases

    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else math.nan
    results = Results(
        args.json,
        device,
        resume=bool(args.after),
        copy_bytes_per_second=None if math.isnan(bandwidth) else bandwidth,
    )
    chosen = [
        case for case in cases() if args.only in str(case) and (not args.tiny or str(case) in TINY_CASES)
    ]
    names = [str(case) for case in chosen]
    for case in chosen[names.index(args.after) + 1 if args.after else 0 :]:
        if time.monotonic() - start > args.seconds:
            results.fail(f"{case} and what follows: no time left of {args.seconds:g} s")
            break
        signal.alarm(args.patience)
        try:
            row, problems = examine(case, OPERATIONS[f"fp8train::{case.operation}"], args, device, bandwidth)
        except Exception as error:  # one that fails must not hide the others
            results.fail(f"{case}: {type(error).__name__}: {str(error)[:500]}")
            if "CUDA error" in str(error):  # nothing more runs in this process
                spent = ["--seconds", str(args.seconds - (time.monotonic() - start)), "--after", str(case)]
                os.execv(sys.executable, [sys.executable, *sys.argv, *spent])
            continue
        finally:
            signal.alarm(0)
        results.add(**row)
        for problem in problems:
            results.fail(problem)
    show(results.rows)
    if device.type == "cuda":
        print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
