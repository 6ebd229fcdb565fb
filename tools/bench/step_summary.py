"""What the measurements of ``train_step.py`` amount to: speeds, ratios, memory, the time of a block."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from measure import Ratio, Timing, print_table, speed_ratio
from step_arguments import Point, make_config
from step_prediction import prediction_of

from fp8train.config.resolve import load_config
from fp8train.live.throughput import flops_per_token, peak_of


def timing_of(rows: Sequence[dict[str, Any]]) -> Timing:
    """All measurements of one variant at one point."""
    return Timing(tuple(seconds for row in rows for seconds in row["seconds"]))


def ratio_of(variant: Timing, base: Timing) -> Ratio:
    """Speed of ``variant`` over ``base``; as many measurements as both have."""
    n = min(len(variant.seconds), len(base.seconds))
    return speed_ratio(Timing(variant.seconds[:n]), Timing(base.seconds[:n]))


def summarise(
    args: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    device: torch.device,
    peaks: dict[tuple[str, Point], float],
) -> list[dict[str, Any]]:
    """One entry for each variant and point: medians, ratios to the first variant, and what was predicted."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        place = (row["at"], row["layers"], row["seq"], row["variant"])
        grouped.setdefault(place, []).append(row)
    result = []
    for (at, layers, seq, name), own in grouped.items():
        point = Point(layers, own[0]["micro_batch"], seq)
        config = make_config(args, name, point)
        own = [row for row in own if row["micro_batch"] == point.micro_batch]
        timing, base_rows = timing_of(own), grouped.get((at, layers, seq, next(iter(args.chosen))), own)
        # tokens per second compare at equal memory, where micro-batches differ
        weight = base_rows[0]["micro_batch"] / point.micro_batch
        ratio = ratio_of(Timing(tuple(s * weight for s in timing.seconds)), timing_of(base_rows))
        per_second = point.tokens / timing.median
        memory, base_memory = (
            peaks[one["variant"], point] if peaks else max(row["peak_bytes"] for row in those)
            for one, those in ((own[0], own), (base_rows[0], base_rows))
        )
        vocab = config.model.vocab_size or args.vocab
        flops = flops_per_token(config.model, seq, vocab_size=vocab)
        peak = peak_of(device_name, fp8=config.precision.gemm.fp8)
        result.append(
            {
                "variant": name,
                "at": at,
                "layers": layers,
                "micro_batch_size": point.micro_batch,
                "seq_length": seq,
                "tokens_per_second": per_second,
                "seconds_per_step": list(timing.seconds),
                "seconds": timing.median,
                "optimizer_seconds": statistics.median(row["optimizer_seconds"] for row in own),
                "peak_bytes": memory,
                "memory_ratio": memory / base_memory,
                "ratio_median": ratio.median,
                "ratio_range": [ratio.low, ratio.high],
                "tflops": per_second * flops / 1e12,
                "mfu": None if peak is None else per_second * flops / peak.flops,
                "mfu_peak": None if peak is None else peak.name,
                "first_loss": own[0]["loss"],
                "predicted": prediction_of(args, name, point),
            }
        )
    return result


def blocks_of(args: argparse.Namespace, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the smallest and the largest number of layers: the time of one block, and of the model's own
    number of them."""
    whole = load_config(args.config, args.overrides).config.model.num_layers
    found = []
    by_place: dict[tuple[str, int, int], dict[int, float]] = {}
    for entry in entries:
        if entry["at"] == "micro-batch":
            place = (entry["variant"], entry["micro_batch_size"], entry["seq_length"])
            by_place.setdefault(place, {})[entry["layers"]] = entry["seconds"]
    for (name, micro_batch, seq), seconds in by_place.items():
        few, many = min(seconds), max(seconds)
        if few == many:
            continue
        block = (seconds[many] - seconds[few]) / (many - few)
        step = seconds[few] + (whole - few) * block
        sizes = {"micro_batch_size": micro_batch, "seq_length": seq}
        found.append(
            {"variant": name, **sizes, "block_seconds": block, "layers": whole, "step_seconds": step}
        )
    return found


def show(
    args: argparse.Namespace, entries: Sequence[dict[str, Any]], blocks: Sequence[dict[str, Any]]
) -> None:
    """Print the tables."""
    base, rows = next(iter(args.chosen)), []
    for entry in entries:
        sizes = f"{entry['layers']} x {entry['micro_batch_size']} x {entry['seq_length']}"
        mfu = "-" if entry["mfu"] is None else f"{entry['mfu']:.1%}"
        said = entry["predicted"]
        rows.append(
            (
                f"{entry['variant']}, same {entry['at']}",
                sizes,
                f"{entry['tokens_per_second']:.0f}",
                str(Ratio(entry["ratio_median"], *entry["ratio_range"])),
                f"{entry['seconds'] * 1e3:.1f}",
                "-" if said is None else f"{said['seconds'] * 1e3:.1f}",
                f"{entry['optimizer_seconds'] * 1e3:.1f}",
                f"{entry['peak_bytes'] / 2**30:.2f} ({entry['memory_ratio']:.2f})",
                "-" if said is None else f"{said['peak_bytes'] / 2**30:.2f}",
                f"{entry['tflops']:.3g}",
                mfu,
            )
        )
    print(f"{args.config.name}, compile {'block' if args.compile else 'off'}")
    header = ("variant", "layers x batch x seq", "tokens/s", f"speed / {base} (range)", "ms", "predicted")
    print_table((*header, "optimizer", "peak GiB (ratio)", "predicted", "TFLOP/s", "MFU"), rows)
    if blocks:
        table = [
            (
                b["variant"],
                f"{b['micro_batch_size']} x {b['seq_length']}",
                f"{b['block_seconds'] * 1e3:.2f}",
                f"{b['step_seconds'] * 1e3:.1f}",
            )
            for b in blocks
        ]
        header = ("variant", "batch x seq", "ms a block", f"ms of a step of {blocks[0]['layers']} blocks")
        print_table(header, table)
