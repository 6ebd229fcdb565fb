"""Where the time of one training step goes on a GPU: its kernels, its launches, and where the host waits.

    python tools/bench/profile_step.py --config configs/llama/llama3_8b.yaml --layers 1 --text profile.txt
    python tools/bench/profile_step.py --tiny --device cpu

Takes the arguments of ``train_step.py``, of which the first variant, layers and length count, and profiles
one step after the warm-up. *Busy* is the sum of the kernels' times over the time of a step without the
profiler: far below 1, the host is late. Launches stand beside the counted ones if ``--predictions`` has them.
Waits are what torch reports in its sync debug mode: lines of Python, and how often. A CPU shows operators.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Results, synchronize
from step_arguments import argument_parser, finish_arguments, make_config, points_of
from step_prediction import prediction_of
from torch.profiler import ProfilerActivity, profile
from train_step import built

from fp8train.comm.processes import choose_device
from fp8train.config.errors import UserError

_MOST = 40
_NOT_LAUNCHED = ("Memcpy", "Memset")


def waits_of(step: Callable[[], object], device: torch.device) -> Counter[str]:
    """Lines of Python where the host waited for the GPU, with their numbers."""
    if device.type != "cuda":
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [
        f"{w.filename}:{w.lineno}"
        for w in caught
        if "synchronizing" in str(w.message) and "tools/bench" not in w.filename  # train_step reads the loss
    ]
    return Counter("/".join(line.split("/")[-3:]) for line in lines)


def kernels_of(step: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """name -> (calls, seconds) of everything that ran on the device in one step; of operators, on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        synchronize(device)
    found: dict[str, tuple[int, float]] = {}
    if not on_gpu:
        return {row.key: (row.count, row.self_cpu_time_total / 1e6) for row in profiler.key_averages()}
    for event in profiler.events() or []:
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        calls, seconds = found.get(event.name, (0, 0.0))
        found[event.name] = (calls + 1, seconds + event.time_range.elapsed_us() / 1e6)
    return found


def text_of(kernels: dict[str, tuple[int, float]], summary: dict[str, Any], waits: Counter[str]) -> str:
    """The report."""
    total = sum(seconds for _, seconds in kernels.values()) or 1.0
    lines = [f"{key}: {value}" for key, value in summary.items()]
    lines += ["", f"{'ms':>10} {'share':>7} {'calls':>7}  kernel"]
    for name, (calls, seconds) in sorted(kernels.items(), key=lambda item: -item[1][1])[:_MOST]:
        lines.append(f"{seconds * 1e3:10.3f} {seconds / total:7.1%} {calls:7}  {name[:160]}")
    lines += ["", "host waits:", *(f"{number:7}  {line}" for line, number in waits.most_common())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Profile and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--text", type=Path, help="write the report here")
    args = finish_arguments(parser)
    try:
        device = choose_device(args.device, 0)
        name, point = next(iter(args.chosen)), points_of(args)[0]
        config = make_config(args, name, point)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    sizes = {"layers": point.layers, "micro_batch": point.micro_batch, "seq": point.seq}
    results = Results(args.json, device, config=args.config.name, variant=name, **sizes)
    with built(config, args.vocab, device) as one:
        step = one.step_of(point)
        for number in range(args.warmup):
            step(number)
        synchronize(device)
        start = time.perf_counter()
        step(0)
        synchronize(device)
        seconds = time.perf_counter() - start
        waits = waits_of(lambda: step(0), device)
        kernels = kernels_of(lambda: step(0), device)
    launches = sum(calls for key, (calls, _) in kernels.items() if not key.startswith(_NOT_LAUNCHED))
    said = prediction_of(args, name, point)
    summary = {
        "step": f"{args.config.name}, {name}, {point.layers} layers, {point.micro_batch} x {point.seq}",
        "milliseconds": round(seconds * 1e3, 3),
        "busy": round(sum(own for _, own in kernels.values()) / seconds, 4),
        "launches": launches,
        "launches_counted": None if said is None else said["launches"],
        "copies_and_fills": sum(calls for calls, _ in kernels.values()) - launches,
        "waits": sum(waits.values()),
        "waits_counted": None if said is None else said["syncs"],
    }
    text = text_of(kernels, summary, waits)
    print(text, end="")
    if args.text is not None:
        args.text.write_text(text, encoding="utf-8")
    for key, (calls, own) in sorted(kernels.items(), key=lambda item: -item[1][1])[:_MOST]:
        results.rows.append({"kernel": key, "calls": calls, "seconds": own})
    if not kernels:
        results.fail("the profiler saw nothing on the device")
    return results.finish(summary=summary, waits=dict(waits))


if __name__ == "__main__":
    sys.exit(main())
