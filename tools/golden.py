"""Do two commits train to the same bits? Records short runs of many configurations, or compares them.

    python tools/golden.py --out golden.json              # before a refactor (some minutes on two cores)
    python tools/golden.py --compare golden.json          # after it: what differs; status 1 then
    python tools/golden.py --compare golden.json O2 tp2   # only configurations with one of these words

A record is of one machine and one torch: bits differ between kinds of CPU, so none is kept in the repository.
Each configuration trains the tests' tiny model for a few steps on 1, 2 or 4 gloo ranks; recorded are the last
loss and a hash of every rank's optimizer states. Scale state is left out: what it does shows in both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tiny model and the workers are the tests'

from fp8train.comm.processes import Layout, Processes, joined_processes  # noqa: E402
from fp8train.config.errors import ConfigError  # noqa: E402
from fp8train.step.trainer import Trainer  # noqa: E402
from tests.distributed.pool import GlooPool  # noqa: E402
from tests.training.tiny import alone, losses, tiny_config  # noqa: E402

STEPS = 8
SCALE_STATE = ("scale_state/", "exact/", "mu/")


def _level(level: str, *overrides: str) -> list[str]:
    return [f"precision.level={level}", *overrides]


def _fp8(**settings: str) -> list[str]:
    return [f"precision.gradient.fp8.{key}={value}" for key, value in settings.items()]


ZERO, PAPER = "parallel.zero=1", "precision.profile=paper"
ON_RANKS: dict[str, list[str]] = {
    "O0": _level("O0"),
    "O0 fp64": _level("O0", "precision.compute=fp64"),
    "O0 clipped": _level("O0", "optimizer.clip_grad_norm=0.2"),
    "O0 bf16 gradients": _level("O0", "precision.gradient.reduce=bf16", "precision.gradient.accumulate=bf16"),
    "O0 zero": _level("O0", ZERO),
    "O1": _level("O1"),
    "O1 exact": _level("O1", *_fp8(reduce="exact"), "run.threads=1"),
    "O1 paper": _level("O1", PAPER),
    "O1 paper exchange": _level("O1", PAPER, *_fp8(reduce="exchange")),
    "O2": _level("O2"),
    "O2 gpt": _level("O2", "model.family=gpt"),
    "O2 one micro-batch": _level("O2", "train.global_batch_size=4"),
    "O2 small buckets": _level("O2", "precision.gradient.bucket_mib=0.003"),
    "O2 lion": _level("O2", "optimizer.name=lion", "optimizer.lr=0.002"),
    "O2 zero": _level("O2", ZERO),
    "O2 zero bf16": _level("O2", ZERO, *_fp8(reduce="bf16")),
    "O2 bf16": _level("O2", *_fp8(reduce="bf16")),
    "O2 fp32": _level("O2", *_fp8(reduce="fp32", accumulate="fp32")),
    "O2 feedback": _level("O2", *_fp8(error_feedback="true")),
    "O2 feedback zero": _level("O2", *_fp8(error_feedback="true"), ZERO),
    "O2 exact": _level("O2", *_fp8(reduce="exact"), "run.threads=1"),
    "O2 shared scale": _level("O2", *_fp8(reduce="shared_scale")),
    "O2 shared scale tree": _level("O2", *_fp8(reduce="shared_scale", sum="tree", accumulate="fp8")),
    "O2 shared scale zero": _level("O2", *_fp8(reduce="shared_scale"), ZERO),
    "O2 paper": _level("O2", PAPER),
    "O3": _level("O3"),
    "O3 whole tensors": _level("O3", "parallel.zero_partition=whole_tensor"),
    "O2 nodes": _level("O2", *_fp8(node_size="2")),
    "O2 nodes bf16": _level("O2", *_fp8(node_size="2", between_nodes="bf16")),
    "O2 nodes zero": _level("O2", *_fp8(node_size="2"), ZERO),
    "mus": _level("O2", "precision.recipe=mus"),
    "te_delayed": _level("O2", "precision.recipe=te_delayed"),
    "rowwise": _level("O2", "precision.recipe=rowwise"),
    "blockwise": _level("O2", "precision.recipe=blockwise"),
}
"""On 1, 2 and 4 data-parallel ranks; those with nodes on 4."""
WIDE = ["model.head_dim=64", "model.num_kv_heads=4", "model.ffn_hidden_size=256"]
LAYOUTS: dict[str, tuple[int, Layout, list[str]]] = {
    "tp2": (2, Layout(tp=2), [*WIDE, "parallel.tp=2"]),
    "tp2 dp2": (4, Layout(tp=2), [*WIDE, "parallel.tp=2"]),
    "tp2 dp2 zero": (4, Layout(tp=2), [*WIDE, "parallel.tp=2", ZERO]),
    "pp2 dp2": (4, Layout(pp=2), ["parallel.pp=2"]),
    "pp2 dp2 tied": (4, Layout(pp=2), ["parallel.pp=2", "model.tie_embeddings=true"]),
    "cp2": (2, Layout(cp=2), ["parallel.cp=2"]),
    "pp2 zbv zero": (
        4,
        Layout(pp=2),
        ["parallel.pp=2", ZERO, "parallel.pipeline.schedule=zbv", "model.num_layers=4"],
    ),
}
"""Name -> (ranks, layout, overrides); at O0, O2 and O3."""


def fingerprint(processes: Processes, overrides: list[str]) -> list[Any]:
    """Last loss, and a hash of this rank's states; why not, if the configuration is refused."""
    try:
        found, trainer = losses(tiny_config(overrides), processes, STEPS)
    except ConfigError as error:
        return ["refused", str(error)]
    return [found[-1], states_of(trainer)]


def states_of(trainer: Trainer) -> str:
    """A hash."""
    sha = hashlib.sha256()
    for name, tensor in sorted(trainer.state_tensors().items()):
        if not name.startswith(SCALE_STATE):
            sha.update(name.encode())
            sha.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def one_rank(
    group: dist.ProcessGroup, rank: int, world_size: int, layout: Layout, cases: dict[str, list[str]]
) -> dict[str, list[Any]]:
    """Runs in the pool."""
    processes = joined_processes(torch.device("cpu"), layout)
    return {name: fingerprint(processes, overrides) for name, overrides in cases.items()}


def record(words: list[str]) -> dict[str, list[Any]]:
    """``{configuration: what every rank found}``."""

    def chosen(cases: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: o for name, o in cases.items() if not words or any(word in name for word in words)}

    torch.set_num_threads(1)  # as the workers
    found: dict[str, list[Any]] = {}
    for name, overrides in chosen({f"1 rank, {name}": o for name, o in ON_RANKS.items()}).items():
        if "nodes" not in name:
            found[name] = [fingerprint(alone(), overrides)]
            print(f"{name}: {found[name][0][0]}", flush=True)
    pool = GlooPool()
    try:
        for ranks in (2, 4):
            cases = {f"{ranks} ranks, {n}": o for n, o in ON_RANKS.items() if ranks == 4 or "nodes" not in n}
            found |= _on_ranks(pool, ranks, Layout(), chosen(cases))
        for name, (ranks, layout, overrides) in LAYOUTS.items():
            cases = {f"{name}, {level}": [*_level(level), *overrides] for level in ("O0", "O2", "O3")}
            found |= _on_ranks(pool, ranks, layout, chosen(cases))
    finally:
        pool.close()
    return found


def _on_ranks(
    pool: GlooPool, ranks: int, layout: Layout, cases: dict[str, list[str]]
) -> dict[str, list[Any]]:
    if not cases:
        return {}
    results = pool.run(one_rank, ranks, layout, cases, timeout=900.0)
    for name in cases:
        print(f"{name}: {results[0][name][0]}", flush=True)
    return {name: [result[name] for result in results] for name in cases}


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only configurations whose names contain one of these")
    parser.add_argument("--out", type=Path, help="write the record here")
    parser.add_argument("--compare", type=Path, help="with this one")
    args = parser.parse_args()
    found = record(args.words)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.compare is None:
        return 0
    before = json.loads(args.compare.read_text())
    known = [name for name in found if name in before]
    differing = [name for name in known if found[name] != before[name]]
    for name in differing:
        print(f"DIFFERS  {name}: {before[name][0]} -> {found[name][0]}")
    new = len(found) - len(known)
    print(
        f"{len(known) - len(differing)} of {len(known)} equal" + (f"; {new} not in the record" if new else "")
    )
    return 1 if differing or not known else 0


if __name__ == "__main__":
    raise SystemExit(main())
