"""Every layout trains as one process does: an all-pairs covering array, run on gloo.

    python tools/layouts.py --list                       # the configurations, without running them
    python tools/layouts.py --out runs/layouts           # run what is missing, print the table
    python tools/layouts.py --out runs/layouts --limit 24

A configuration is a value for each factor below (tensor-, pipeline-, data-, context-parallel ranks, ZeRO
and its partition, level, gradient reduction, compute type, family, tied embeddings, schedule, recomputation,
micro-batches). All pairs of values that are legal together appear in some configuration; the array is built
greedily from a fixed seed. Each is trained for a few steps and its losses are compared with those of one
process, as are the FP8 codes that the GEMMs of the first step read. Tensor-parallel ranks round partial sums
where one process rounds the total, so they are also compared with one process that rounds as they do: no code
may differ from its. The result of each is a line of ``results.jsonl``, so an interrupted run continues.
``--markdown FILE`` writes the table below the text that is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the workers and the comparison of codes are the tests'

from fp8train.comm.collectives import alone  # noqa: E402
from fp8train.comm.processes import Layout, Processes, joined_processes  # noqa: E402
from fp8train.config.errors import ConfigError  # noqa: E402
from fp8train.config.resolve import resolve_mapping  # noqa: E402
from fp8train.config.schema import Config  # noqa: E402
from fp8train.step.trainer import Trainer  # noqa: E402
from tests.distributed.operand_codes import Changed, Codes, capture, changed  # noqa: E402
from tests.distributed.pool import GlooPool  # noqa: E402
from tests.distributed.split_sums import sums_in_parts  # noqa: E402

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
    "reduce": ["wide", "bf16", "exchange", "two_level", "shared_scale", "exact"],
    "compute": ["fp64", "fp32", "bf16"],
    "model": ["gpt-tied", "gpt-untied", "llama-tied", "llama-untied"],
    "schedule": ["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"],
    "recompute": ["none", "selective", "full"],
    "micro_batches": [4, 8],
}
"""``reduce``: of the FP8 plan's gradients; ``wide`` keeps them in high precision, ``two_level`` exchanges in
nodes of two ranks first. ``micro_batches``: of a step on one rank without data parallelism."""
Configuration = Mapping[str, Any]
# Cut in 8 by tp 4 x cp 2. Rows of 512 are whole blocks of 128 when cut in 4. Llama's queries share keys.
HEADS = {
    "gpt": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64},
    "llama": {"num_heads": 16, "num_kv_heads": 8, "head_dim": 32},
}
# Share of a linear's codes that may differ from a process that rounds alike: none with two tensor-parallel
# ranks; with more, all-reduce adds the softmax's FP32 sums in an order of its own.
SUM_ORDER_CODES = 1e-3


@dataclass(frozen=True)
class Bounds:
    """Relative differences of losses that rounding explains.

    Attributes:
        loss: to one process.
        loss_rounded_alike: to one process that rounds sums as tensor-parallel ranks do.
    """

    loss: float
    loss_rounded_alike: float

    @classmethod
    def of(cls, c: Configuration) -> Bounds:
        """Of a configuration. FP64 and FP32 differ by the order of sums; every rounding to BF16 in another
        place than in one process may move the loss by 2^-9 in each step; and with FP8 gradients each rank
        casts the gradients of its own samples, where one process casts their sum once (``exact`` casts each
        micro-batch's, but ranks that share a sequence have parts of one, rounded one by one). In FP32 too an
        FP8 code may fall on the other side of its rounding boundary."""
        order = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 1e-5}[c["compute"]]
        in_steps = STEPS * 2**-9
        in_parts = c["cp"] > 1 or (c["tp"] > 1 and c["compute"] != "fp64")  # gradients of norms, with tp
        exact_sums = {"wide": c["compute"] == "fp64", "exact": not in_parts}
        one_cast = exact_sums.get(c["reduce"], False)
        ranks_cast = c["level"] != "O0" and not one_cast and c["dp"] * c["cp"] > 1
        gradients = order
        if c["compute"] == "fp32" and c["level"] != "O0" and c["tp"] > 1:
            gradients = 1e-3
        if c["compute"] == "bf16":
            # Norms see parts of the sequence; ends of a pipeline each have a gradient of a tied embedding.
            tied = c["pp"] > 1 and c["model"].endswith("-tied")
            gradients = in_steps / 4 if c["tp"] * c["cp"] * c["dp"] > 1 or tied else order
        alike = in_steps if ranks_cast else gradients
        # Of partial sums, to BF16 or to FP8.
        rounds = c["tp"] > 1 and (c["compute"] == "bf16" or (c["compute"] == "fp32" and c["level"] == "O3"))
        return cls(1.5 * in_steps if rounds else alike, alike)


def legal(c: Configuration) -> bool:
    """Whether the values make sense together (and fit ``MOST_RANKS``)."""
    ranks = c["tp"] * c["pp"] * c["dp"] * c["cp"]
    return (
        ranks <= MOST_RANKS
        and (c["pp"] > 1 or c["schedule"] == "1f1b")
        and (c["dp"] * c["cp"] > 1 or c["zero"] == "none")
        and c["micro_batches"] % c["dp"] == 0
        and not (c["level"] == "O3" and c["zero"] == "none" and c["dp"] * c["cp"] > 1)
        and (c["level"] != "O0" or c["reduce"] == "wide")
        and (c["dp"] * c["cp"] == 4 or c["reduce"] != "two_level")
        # Both ends of a pipeline round their parts of a tied gradient.
        and not (c["reduce"] == "exact" and c["pp"] > 1 and c["model"].endswith("-tied"))
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


def to_config(c: Configuration, steps: int, *, parallel: bool) -> Config:
    """The run of a configuration, on its layout or on one process."""
    family, _, tied = c["model"].partition("-")
    overrides = [
        f"precision.level={c['level']}",
        f"precision.compute={c['compute']}",
        f"model.tie_embeddings={str(tied == 'tied').lower()}",
        f"train.activation_checkpointing={c['recompute']}",
    ]
    if c["level"] != "O0":
        reduce = "exchange" if c["reduce"] == "two_level" else c["reduce"]
        overrides += (
            ["precision.gradient.format=high_precision"]
            if reduce == "wide"
            else [f"precision.gradient.fp8.reduce={reduce}", "run.threads=1"]
        )
        if c["reduce"] == "two_level" and parallel:
            overrides += ["precision.gradient.fp8.node_size=2"]
        if c["compute"] == "fp64":  # equal to the last digit: nothing that rounds by rank
            overrides += ["precision.traffic.grad_input=compute"]
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
            **HEADS[family],
            "ffn_hidden_size": 512,
            "vocab_size": VOCAB,
            "vocab_multiple": 16,
        },
        "data": {"prefix": "unused", "seq_length": 32},
        "optimizer": {"lr": 0.005},
        "train": {"steps": steps, "global_batch_size": c["micro_batches"], "micro_batch_size": 1},
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


def train(config: Config, processes: Processes, parts: int = 1) -> tuple[list[float], Codes | None, Trainer]:
    """Losses of all steps and the operand codes of the first; None without FP8. ``parts``: a process
    that is alone rounds its sums as so many tensor-parallel ranks do."""
    trainer = Trainer(config, processes, vocab_size=VOCAB)
    fp8 = config.precision.traffic.grad_input == "fp8"
    with sums_in_parts(trainer, parts, fp8_grad_input=fp8) if parts > 1 else nullcontext():
        with capture(trainer) if trainer.built.fp8 is not None else nullcontext() as codes:
            losses = [float(trainer.step(0, batch(config, 0, processes)).loss)]
        losses += [
            float(trainer.step(i, batch(config, i, processes)).loss) for i in range(1, config.train.steps)
        ]
    return losses, codes, trainer


Shares = dict[str, dict[str, Changed]]


def one_rank(
    group: dist.ProcessGroup, rank: int, world_size: int, c: Configuration, steps: int, expected: list[Path]
) -> tuple[list[float], list[Shares]]:
    """Runs in the pool: losses, and how many codes differ from those in each file."""
    processes = joined_processes(torch.device("cpu"), Layout(c["pp"], c["cp"], c["tp"]))
    losses, codes, trainer = train(to_config(c, steps, parallel=True), processes)
    if codes is None:
        return losses, []
    return losses, [changed(codes, Codes(*torch.load(file)), trainer, processes) for file in expected]


def worst_share(per_rank: list[Shares], operand: str) -> float | None:
    """The largest share of changed codes of one linear, over all ranks that hold some of it."""
    total: dict[str, Changed] = {}
    for shares in per_rank:
        for name, found in shares.items():
            total[name] = total.get(name, Changed(0, 0)).plus(found[operand])
    return max((one.share for one in total.values()), default=None)


def worst_shares(per_rank: list[Shares]) -> dict[str, float | None]:
    """Of each operand."""
    return {operand: worst_share(per_rank, operand) for operand in ("w", "x", "grad_output")}


def compare(c: Configuration, pool: GlooPool, steps: int = STEPS) -> dict[str, Any]:
    """Train on the layout, on one process, and on one that rounds its sums as the layout's ranks do."""
    began = time.monotonic()
    single = Processes(torch.device("cpu"), 1, 0, alone(), None)
    config = to_config(c, steps, parallel=False)
    references = [train(config, single, parts)[:2] for parts in sorted({1, c["tp"]})]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, (_, codes) in enumerate(references):
            if codes is not None:
                files.append(Path(folder) / f"{number}.pt")
                torch.save(tuple(codes), files[-1])
        ranks = c["tp"] * c["pp"] * c["dp"] * c["cp"]
        results = pool.run(one_rank, ranks, c, steps, files, timeout=900.0)
    got = results[0][0]
    differs = [worst_difference(got, losses) for losses, _ in references]
    shares = [worst_shares([found[number] for _, found in results]) for number in range(len(files))]
    agree = all(losses == got for losses, _ in results)
    bounds = Bounds.of(c)
    ok = differs[0] <= bounds.loss and differs[-1] <= bounds.loss_rounded_alike and agree
    if shares:
        nothing_rounded = c["compute"] == "fp64"  # so a plain process has the same codes
        checked = shares[0] if nothing_rounded else shares[-1]
        allowed = SUM_ORDER_CODES if c["tp"] > 2 and not nothing_rounded else 0.0
        ok = ok and all(share <= allowed for share in checked.values() if share is not None)
    return {
        **c,
        "differs": differs[0],
        "allowed": bounds.loss,
        "differs_rounded_alike": differs[-1],
        "allowed_rounded_alike": bounds.loss_rounded_alike,
        "codes": shares[0] if shares else {},
        "codes_rounded_alike": shares[-1] if shares else {},
        "ranks_agree": agree,
        "ok": ok,
        "seconds": time.monotonic() - began,
    }


def worst_difference(got: list[float], expected: list[float]) -> float:
    """The largest relative one."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row per configuration."""
    head = [*FACTORS, "loss difference", "loss difference, rounded alike", "x codes differ"]
    head += ["grad_output codes differ", "codes differ, rounded alike", "ok"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        codes, alike = row["codes"], row["codes_rounded_alike"]
        shares = [f"{codes[name]:.2%}" if codes else "" for name in ("x", "grad_output")]
        shares += [f"{max(alike.values()):.2%}" if alike else ""]
        cells = [*(str(row[name]) for name in FACTORS)]
        cells += [f"{row['differs']:.1e}", f"{row['differs_rounded_alike']:.1e}"]
        lines.append("| " + " | ".join([*cells, *shares, "yes" if row["ok"] else "NO"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/layouts"))
    parser.add_argument("--list", action="store_true", help="print the configurations and stop")
    parser.add_argument("--limit", type=int, help="run at most this many")
    parser.add_argument("--markdown", type=Path, help="write the table here, below what is there")
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
    torch.set_num_threads(1)  # as the workers
    pool = GlooPool()
    try:
        for number, c in enumerate(array[: args.limit], 1):
            if c in done:
                continue
            try:
                rows.append(compare(c, pool))
            except ConfigError as error:
                raise SystemExit(f"{c}: {error}") from None
            with log.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            verdict = "ok" if rows[-1]["ok"] else "DIFFERS"
            numbers = " ".join(f"{rows[-1][name]:.1e}" for name in ("differs", "differs_rounded_alike"))
            numbers += f" {rows[-1]['seconds']:.0f} s"
            print(f"{number}/{len(array)} {verdict} {numbers} {json.dumps(c)}", flush=True)
    finally:
        pool.close()
    print(table(rows))
    if args.markdown is not None:
        text = args.markdown.read_text() if args.markdown.exists() else ""
        prose = text[: text.find("| tp |")] if "| tp |" in text else text
        args.markdown.write_text(prose + table(rows) + "\n")
    if not all(row["ok"] for row in rows):
        raise SystemExit("some layouts differ")


if __name__ == "__main__":
    main()
