"""Every layout trains as one process does: an all-pairs covering array, run on gloo.

    python tools/layouts.py --list                       # the configurations, without running them
    python tools/layouts.py --out runs/layouts           # run what is missing, print the table
    python tools/layouts.py --out runs/layouts --limit 24

A configuration is a value for each factor below (tensor-, pipeline-, data-, context-parallel ranks, ZeRO and
its partition, level, family, tied embeddings, schedule, recomputation, accumulation, carrier). All pairs of
values that are legal together appear in some configuration; the array is built greedily from a fixed seed.
Each is trained for a few steps and its losses are compared with those of one process; the result of each is a
line of ``results.jsonl``, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fp8train.comm.collectives import alone
from fp8train.comm.processes import Layout, Processes, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import Config
from fp8train.training.trainer import Trainer

STEPS = 10
VOCAB = 64
MOST_RANKS = 8
FACTORS: dict[str, list[Any]] = {
    "tp": [1, 2, 4],
    "pp": [1, 2, 4],
    "dp": [1, 2, 4],
    "cp": [1, 2],
    "zero": ["none", "rows", "whole_tensor"],
    "level": ["O0", "O1", "O2", "O3"],
    "compute": ["fp64", "fp32", "bf16"],
    "model": ["gpt-tied", "gpt-untied", "llama-tied", "llama-untied"],
    "schedule": ["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"],
    "recompute": ["none", "selective", "full"],
    "micro_batches": [4, 8],
}
"""``micro_batches``: of a step on one rank without data parallelism."""
# Relative difference of losses. FP64 differs by the order of sums alone; where gradients travel in FP8 the
# ranks round what one process does not. BF16 partial sums are rounded once more per rank.
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 5e-3}
LOSSY = 2e-2

Configuration = Mapping[str, Any]


def legal(c: Configuration) -> bool:
    """Whether the values make sense together (and fit ``MOST_RANKS``)."""
    ranks = c["tp"] * c["pp"] * c["dp"] * c["cp"]
    return (
        ranks <= MOST_RANKS
        and (c["pp"] > 1 or c["schedule"] == "1f1b")
        and (c["dp"] * c["cp"] > 1 or c["zero"] == "none")
        and c["micro_batches"] % c["dp"] == 0
        and not (c["level"] == "O3" and c["zero"] == "none" and c["dp"] * c["cp"] > 1)
        # One micro-batch for each pipeline rank, at least.
        and c["micro_batches"] // c["dp"] >= c["pp"]
    )


def covering_array(seed: int = 0) -> list[dict[str, Any]]:
    """Configurations that hold every legal pair of values, found greedily."""
    draw = random.Random(seed)
    names = list(FACTORS)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]
    }
    found: list[dict[str, Any]] = []
    failures = 0
    while missing and failures < 400:
        best: tuple[int, dict[str, Any]] = (0, {})
        wanted = draw.choice(sorted(missing, key=str))
        for _ in range(60):
            candidate = {name: draw.choice(values) for name, values in FACTORS.items()}
            candidate |= dict(wanted)
            if legal(candidate):
                gain = sum(pair in missing for pair in _pairs(candidate))
                best = max(best, (gain, candidate), key=lambda item: item[0])
        if best[0] == 0:
            failures += 1
            continue
        found.append(best[1])
        missing -= set(_pairs(best[1]))
    return found


def _pairs(c: Configuration) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    for a, b in itertools.combinations(FACTORS, 2):
        yield (a, c[a]), (b, c[b])


def to_config(c: Configuration, *, parallel: bool) -> Config:
    """The run of a configuration, on its layout or on one process."""
    family, _, tied = c["model"].partition("-")
    overrides = [
        f"precision.level={c['level']}",
        f"precision.compute={c['compute']}",
        f"model.tie_embeddings={str(tied == 'tied').lower()}",
        f"train.activation_checkpointing={c['recompute']}",
    ]
    if c["compute"] == "fp64" and c["level"] != "O0":
        # Equal to the last digit only where nothing is rounded on the wire that one process keeps.
        overrides += ["precision.gradient.format=high_precision", "precision.traffic.grad_input=compute"]
    if parallel:
        overrides += [f"parallel.{axis}={c[axis]}" for axis in ("tp", "pp", "cp")]
        overrides += ["parallel.zero=" + ("none" if c["zero"] == "none" else "1")]
        if c["zero"] != "none":
            overrides += [f"parallel.zero_partition={c['zero']}"]
        if c["pp"] > 1:
            overrides += [f"parallel.pipeline.schedule={c['schedule']}"]
    elif c["level"] == "O3":
        overrides += ["parallel.zero=none"]
    mapping = {
        "model": {
            "family": family,
            "num_layers": 8,
            "hidden_size": 32,
            "num_heads": 8,
            "num_kv_heads": 8,
            "head_dim": 64,
            "ffn_hidden_size": 512,
            "vocab_size": VOCAB,
        },
        "data": {"prefix": "unused", "seq_length": 16},
        "optimizer": {"lr": 0.005},
        "train": {"steps": STEPS, "global_batch_size": c["micro_batches"], "micro_batch_size": 1},
        "logging": {"cast_statistics_interval": 0},
    }
    return resolve_mapping(mapping, overrides).config


def batch(config: Config, step: int, processes: Processes) -> torch.Tensor:
    """int64 [A, 1, S+1]: this rank's micro-batches of a learnable sequence, the same for every layout."""
    draw = torch.Generator().manual_seed(step)
    rows = [torch.randint(VOCAB, (config.train.global_batch_size, 1), generator=draw)]
    for _ in range(config.data.seq_length):
        rows.append((rows[-1] * 5 + 3 + torch.randint(2, rows[-1].shape, generator=draw)) % VOCAB)
    tokens = torch.cat(rows, dim=1).unsqueeze(1)
    return tokens.chunk(processes.dp.size)[processes.dp.rank]


def losses(config: Config, processes: Processes) -> list[float]:
    """Of ``STEPS`` steps."""
    trainer = Trainer(config, processes, vocab_size=VOCAB)
    return [float(trainer.step(i, batch(config, i, processes)).loss) for i in range(STEPS)]


def _rank(rank: int, ranks: int, store: str, c: Configuration, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    processes = joined_processes(torch.device("cpu"), Layout(c["pp"], c["cp"], c["tp"]))
    found = losses(to_config(c, parallel=True), processes)
    results[rank] = found
    dist.destroy_process_group()


def compare(c: Configuration) -> dict[str, Any]:
    """Train on the layout and on one process."""
    torch.set_num_threads(1)
    began = time.monotonic()
    ranks = c["tp"] * c["pp"] * c["dp"] * c["cp"]
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, args=(ranks, f"{folder}/store", c, results), nprocs=ranks)
        got = [results[rank] for rank in range(ranks)]
    single = Processes(torch.device("cpu"), 1, 0, alone(), None)
    expected = losses(to_config(c, parallel=False), single)
    worst = max(abs(a - b) / abs(b) for a, b in zip(got[0], expected, strict=True))
    lossy = c["level"] != "O0" and c["compute"] != "fp64"
    bound = LOSSY if lossy else TOLERANCE[c["compute"]]
    return {
        **c,
        "worst": worst,
        "bound": bound,
        "ranks_agree": all(other == got[0] for other in got),
        "ok": worst <= bound and all(other == got[0] for other in got),
        "seconds": time.monotonic() - began,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row per configuration."""
    head = [*FACTORS, "worst", "bound", "ok"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [str(row[name]) for name in FACTORS]
        lines.append(
            "| " + " | ".join([*cells, f"{row['worst']:.1e}", f"{row['bound']:.0e}", str(row["ok"])]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/layouts"))
    parser.add_argument("--list", action="store_true", help="print the configurations and stop")
    parser.add_argument("--limit", type=int, help="run at most this many")
    args = parser.parse_args()
    array = covering_array()
    if args.list:
        print("\n".join(json.dumps(c) for c in array))
        print(f"{len(array)} configurations")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "results.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = [{name: row[name] for name in FACTORS} for row in rows]
    for number, c in enumerate(array[: args.limit], 1):
        if c in done:
            continue
        try:
            rows.append(compare(c))
        except ConfigError as error:
            raise SystemExit(f"{c}: {error}") from None
        with log.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        verdict = "ok" if rows[-1]["ok"] else "DIFFERS"
        print(f"{number}/{len(array)} {verdict} {rows[-1]['worst']:.1e} {json.dumps(c)}", flush=True)
    print(table(rows))
    if not all(row["ok"] for row in rows):
        raise SystemExit("some layouts differ")


if __name__ == "__main__":
    main()
