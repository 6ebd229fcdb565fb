"""Compile the kernels of fused operations for GPUs that need not be there; print what they take.

    python tools/compile_kernels.py [--capability 90 100] [--only cast] [--json FILE]

Each case of ``tools/kernel_cases.py`` runs its launcher on tensors without memory; launches are caught,
compiled by Triton, and the binaries are read by the cuobjdump that Triton brings. What registers do not hold
lies on the stack, in device memory: a kernel with a stack is too large.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import triton

from fp8train.kernels.fused_op import OPERATIONS
from fp8train.kernels.gpu.launch import Launch, compile_launch, observed
from tools.kernel_cases import Case, cases

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one capability; sizes in bytes, ``stack`` per thread."""

    case: str
    kernel: str
    capability: int
    registers: int
    shared: int
    stack: int
    warps: int
    programs: int


def launches_of(case: Case) -> list[Launch]:
    """The launches that a case would make."""
    seen: list[Launch] = []
    with observed(lambda launch: bool(seen.append(launch))):
        OPERATIONS[f"fp8train::{case.operation}"].launch(*case.arguments)
    return seen


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread of a kernel's binary; registers that do not fit go to the
    stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def compile_case(case: Case, capability: int) -> list[Compiled]:
    """Compile every kernel that a case launches."""
    result = []
    for launch in launches_of(case):
        kernel = compile_launch(launch, capability)
        registers, stack = resources(kernel.asm["cubin"])
        programs = 1
        for size in launch.grid:
            programs *= size
        metadata = kernel.metadata
        name = launch.kernel.fn.__name__.strip("_")
        result.append(
            Compiled(
                str(case), name, capability, registers, metadata.shared, stack, metadata.num_warps, programs
            )
        )
    return result


def main() -> int:
    """Compile, print a table, and return 1 if a case's launches are not as many as its operation declares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[90, 100])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Compiled] = []
    print(f"Triton {triton.__version__}")
    print(
        f"{'case':44} {'kernel':28} {'sm':>4} {'regs':>5} {'shared':>7} {'stack':>6} {'warps':>5} "
        f"{'programs':>9}"
    )
    for case in cases():
        if args.only not in str(case):
            continue
        for capability in args.capability:
            for row in compile_case(case, capability):
                rows.append(row)
                print(
                    f"{row.case:44} {row.kernel:28} {row.capability:4} {row.registers:5} {row.shared:7} "
                    f"{row.stack:6} {row.warps:5} {row.programs:9}",
                    flush=True,
                )
    if args.json is not None:
        document = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    missing = {name.partition("::")[2] for name in OPERATIONS} - {case.operation for case in cases()}
    if missing:
        print(f"no case for: {', '.join(sorted(missing))}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
