"""Bytes and time of an optimizer step: stored, peak while stepping, nanoseconds a parameter, for every
state plan.

    python tools/bench/optimizer_step.py --json out.json
    python tools/bench/optimizer_step.py --tiny

One square matrix (default 8192 x 8192, 67M parameters) with an FP8 gradient. *Stored* is what lies there
between steps, scales included; *peak* adds the most that tensors created during a step held at once,
counted by a dispatch mode on CPUs and by the allocator on CUDA. Plans are timed in turn; ratios to FP32
states are taken round by round. *Of copy* holds the bytes that a step must move (states read and written,
the gradient read, the weight written) over its time against the rate of a large copy.
"""

from __future__ import annotations

import argparse
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from measure import copy_bandwidth, describe_machine, print_table, speed_ratio, time_in_turn, write_json
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8train.models.param_spec import ParamSpec
from fp8train.optim.optimizer import Optimizer
from fp8train.parallel.gradients.block_storage import BlockStorage, row_blocks
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.exchange_sum import ExchangeSum
from fp8train.parallel.gradients.held import GradientReader
from fp8train.parallel.gradients.memory import Memory
from fp8train.parallel.gradients.receivers import Member, Places
from fp8train.precision.number_formats import E4M3
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamW, AdamWSettings

_GRADIENT_BYTES, _WEIGHT_BYTES = 1 + 1 / 128, 2  # FP8 with a byte of scale a block; BF16
_SR = StateFormat("fp16_scaled", rounding="stochastic")
_TENSOR = StateFormat("fp16_scaled", granularity="tensor")
PLANS = {
    "FP32": StateFormats(),
    "O1": StateFormats(_SR),
    "O2": StateFormats(_SR, StateFormat("e4m3"), StateFormat("fp16_scaled")),
    "O2, v E4M3 expanded": StateFormats(_SR, StateFormat("e4m3"), StateFormat("e4m3", expand=True)),
    "O2, v sqrt E4M3": StateFormats(
        _SR, StateFormat("e4m3"), StateFormat("e4m3", sqrt=True, rounding="stochastic")
    ),
    "paper": StateFormats(_TENSOR, StateFormat("e4m3", granularity="tensor"), _TENSOR),
    "BF16 + remainder, O2 moments": StateFormats(
        StateFormat("bf16_remainder"), StateFormat("e4m3"), StateFormat("fp16_scaled")
    ),
}


class PeakMemory(TorchDispatchMode):
    """Bytes of live storages created inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs | self._known:
                self._track(tensor)
        return result

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


def gradient_reader(size: int, device: torch.device) -> GradientReader:
    """A random gradient in FP8 blocks."""
    torch.manual_seed(0)
    members = [Member("w", (size, size))]
    places = Places(members, row_blocks(members, 128))
    storage = BlockStorage(places, block=128, fmt=E4M3, accumulate=None, memory=Memory(device))
    bucket = Bucket(storage, ExchangeSum(storage, None))
    bucket.begin()
    bucket.add(0, torch.randn(size, size, device=device) * 1e-4, first=True)
    bucket.launch()
    bucket.advance()
    bucket.finish()
    return bucket.reader(0)


def make(plan: StateFormats, size: int, device: torch.device) -> tuple[Optimizer, nn.Parameter]:
    """An optimizer of one BF16 matrix."""
    parameter = nn.Parameter(torch.zeros(size, size, dtype=torch.bfloat16, device=device))
    spec = ParamSpec("w", "hidden", (size, size), size, size, "normal", 0.02, 1.0, "lr_times_lambda", True)
    settings = AdamWSettings(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8)
    optimizer = Optimizer(AdamW(settings), {"w": parameter}, {"w": spec}, plan, seed=1)
    optimizer.states.seed_master("w", torch.randn(size, size) * 0.02)
    return optimizer, parameter


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=8192, help="side of the matrix")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cpu-time", action="store_true", help="compare CPU seconds: for a busy machine")
    parser.add_argument("--tiny", action="store_true", help="side 1024, 2 rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.size, args.rounds = 1024, 2
    if args.threads:
        torch.set_num_threads(args.threads)
    device, count = torch.device(args.device), args.size**2
    reader = gradient_reader(args.size, device)
    one = torch.ones((), device=device)
    optimizers = {name: make(plan, args.size, device)[0] for name, plan in PLANS.items()}

    def step(optimizer: Optimizer, number: int) -> None:
        optimizer.step(lambda _: reader, step=number + 1, lr_factor=1.0, grad_multiplier=one)

    temporaries = {}
    for name, optimizer in optimizers.items():
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(optimizer, 0)
            temporaries[name] = torch.cuda.max_memory_allocated() - before
        else:
            with PeakMemory() as memory:
                step(optimizer, 0)
            temporaries[name] = memory.peak
    timings = time_in_turn(
        {name: lambda i, o=optimizer: step(o, i + 1) for name, optimizer in optimizers.items()},
        rounds=args.rounds,
        steps_per_round=1,
        warmup=1,
        device=device,
        clock=time.process_time if args.cpu_time else time.perf_counter,
    )
    rows, result = [], {}
    copy_rate = copy_bandwidth(device, size=2**30 if device.type == "cuda" else 2**26)
    for name, optimizer in optimizers.items():
        stored = sum(optimizer.states.stored_bytes(in_plan_only=True).values())
        peak = 1 + temporaries[name] / stored
        nanoseconds = timings[name].median / count * 1e9
        ratio = speed_ratio(timings[name], timings["FP32"])
        rate = (2 * stored + (_GRADIENT_BYTES + _WEIGHT_BYTES) * count) / timings[name].median
        result[name] = {
            "stored_bytes_per_parameter": stored / count,
            "peak_over_stored": peak,
            "nanoseconds_per_parameter": nanoseconds,
            "bytes_per_second": rate,
            "share_of_copy": rate / copy_rate,
            "seconds": list(timings[name].seconds),
        }
        numbers = (f"{stored / count:.3f}", f"{peak:.3f}", f"{nanoseconds:.3g}", f"{rate / copy_rate:.1%}")
        rows.append((name, *numbers, str(ratio)))
    header = ("states (master, m, v)", "bytes/param", "peak / stored", "ns/param", "of copy", "speed / FP32")
    print_table(header, rows)
    if args.json:
        machine = describe_machine(device)
        about = {"complete": True, "machine": machine, "parameters": count}
        write_json(args.json, {**about, "copy_bytes_per_second": copy_rate, "plans": result})


if __name__ == "__main__":
    main()
