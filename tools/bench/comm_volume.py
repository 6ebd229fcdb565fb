"""Bytes that a rank sends in one optimizer step, at every precision level: computed, and counted on gloo.

    python tools/bench/comm_volume.py configs/3d/gpt_7b.yaml --dp 4
    python tools/bench/comm_volume.py configs/llama/llama3_8b.yaml parallel.tp=8 train.micro_batch_size=2
    python tools/bench/comm_volume.py --measure --json tools/bench/results/comm_volume_cpu.json
    python tools/bench/comm_volume.py --tiny

With a configuration: the formulas of ``volume_formulas.py``, for the same layout at O0 to O3.
``parallel.zero`` is part of the layout: it stays what the configuration says (at its own level), so that a
ratio compares formats, not algorithms. Of several pipeline ranks the one that sends most at the first level
is shown; ranks along the other axes send the same.

``--measure`` trains a tiny Llama and a tiny GPT for one step in processes on this machine and holds what the
collectives counted against the formulas, row by row, for every rank. A difference above 1 % is an error. What
the formulas leave out (amaxes, norms, the loss) is shown as counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import describe_machine, print_table, write_json
from volume_formulas import Flow, most_loaded, rank_steps, volume

from fp8train.comm.processes import AXES, Layout, Processes, joined_processes
from fp8train.config.errors import UserError
from fp8train.config.resolve import load_config, resolve_mapping
from fp8train.config.schema import Config
from fp8train.config.world import accumulation_steps, model_ranks
from fp8train.step.trainer import Trainer

LEVELS = ("O0", "O1", "O2", "O3")
LIMIT = 0.01
SMALL = ("amax", "check", "gradient_fp8_plan_scale", "loss", "norm", "saturated", "saturation", "statistics")

# Rows that tensor parallelism cuts are 256 long: halves are whole blocks. The vocabulary is padded to 512.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 4, "ffn_hidden_size": 256, "vocab_size": 500},
    "gpt": {"ffn_hidden_size": 256, "vocab_size": 500},
}
NO_ZERO = "parallel.zero=none"
LAYOUTS: dict[str, list[str]] = {
    "tp 2": ["parallel.tp=2", NO_ZERO],
    "tp 2, full recomputation": ["parallel.tp=2", NO_ZERO, "train.activation_checkpointing=full"],
    "cp 2": ["parallel.cp=2", NO_ZERO],
    "cp 2, selective recomputation": ["parallel.cp=2", NO_ZERO, "train.activation_checkpointing=selective"],
    "dp 2, ZeRO": ["parallel.dp=2", "parallel.zero=1"],
    "pp 2": ["parallel.pp=2", NO_ZERO],
    "dp 2 x tp 2, ZeRO": ["parallel.dp=2", "parallel.tp=2", "parallel.zero=1"],
    "pp 2 x tp 2": ["parallel.pp=2", "parallel.tp=2", NO_ZERO],
}
MEASURED_LEVELS = ("O0", "O2", "O3")


def tiny_config(family: str, overrides: Sequence[str]) -> Config:
    """Two layers of width 64, four micro-batches of one sequence of 32 tokens."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 8, "head_dim": 32}
    mapping = {
        "model": {"family": family, **sizes, **FAMILIES[family]},
        "data": {"prefix": "unused", "seq_length": 32},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 1},
        "logging": {"cast_statistics_interval": 0},
    }
    return resolve_mapping(mapping, overrides).config


def data_parallel(config: Config) -> int:
    """Data-parallel ranks of a configuration; one where it says ``auto``."""
    return 1 if config.parallel.dp == "auto" else config.parallel.dp


def world_size(overrides: Sequence[str]) -> int:
    """Processes of a layout."""
    config = tiny_config("llama", overrides)
    return data_parallel(config) * model_ranks(config)


def axis_names(processes: Processes) -> dict[str, str]:
    """``{group: the axes of more than one rank that it covers}``, as the formulas name them."""
    covered = {"replicas": ("dp", "cp"), "sequence": ("cp", "tp"), "stage": ("dp", "cp", "tp")}
    covered |= {"everyone": AXES, **{axis: (axis,) for axis in AXES}}
    wide = [axis for axis in AXES if getattr(processes, axis).size > 1]
    return {name: "+".join(axis for axis in wide if axis in axes) for name, axes in covered.items()}


def count_step(config: Config) -> dict[Flow, float]:
    """What this process sends in a step of training; collective over the default group."""
    parallel, length = config.parallel, config.data.seq_length
    layout = Layout(pp=parallel.pp, cp=parallel.cp, tp=parallel.tp)
    processes = joined_processes(torch.device("cpu"), layout)
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    trainer = Trainer(config, processes, vocab_size=vocab_size)
    before = {name: group.sent.copy() for name, group in processes.groups.items()}
    generator = torch.Generator().manual_seed(processes.dp.rank)
    shape = (accumulation_steps(config, processes.dp.size), config.train.micro_batch_size, length + 1)
    result = trainer.step(0, torch.randint(vocab_size, shape, generator=generator))
    assert result.applied, "the step was skipped, so no weights were sent"
    axes = axis_names(processes)
    return {
        Flow(axes[group], name): float(count)
        for group, counters in processes.groups.items()
        for name, count in (counters.sent - before[group]).items()
    }


def run_rank(rank: int, ranks: int, cases: Mapping[tuple[str, str, str], Sequence[str]], folder: str) -> None:
    """One process: a step of every case; saves what it counted."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    found = {}
    for case, overrides in cases.items():
        found[case] = {tuple(flow): n for flow, n in count_step(tiny_config(case[1], overrides)).items()}
        dist.barrier()
    torch.save(found, f"{folder}/found{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compare(config: Config, counted: Sequence[Mapping[Flow, float]]) -> dict[str, Any]:
    """Every rank's counters beside the formulas: rows of the most loaded rank, and the worst of all."""
    volumes = [volume(step) for step in rank_steps(config, dp=data_parallel(config))]
    inner = config.parallel.cp * config.parallel.tp
    place = [rank // inner % config.parallel.pp for rank in range(len(counted))]
    shown = place.index(most_loaded(volumes))
    rows = []
    for flow in sorted(
        {flow for one in (*volumes, *counted) for flow in one if not is_small(flow)}, key=order
    ):
        pairs = [
            (volumes[place[rank]].get(flow, 0.0), one.get(flow, 0.0)) for rank, one in enumerate(counted)
        ]
        worst = max(abs(count - formula) / max(formula, 1.0) for formula, count in pairs)
        rows.append(
            {
                "axis": flow.axis,
                "traffic": flow.name,
                "computed": pairs[shown][0],
                "counted": pairs[shown][1],
                "largest_difference": worst,
            }
        )
    small = sum(n for flow, n in counted[shown].items() if is_small(flow))
    return {"rows": rows, "small": small, "total": sum(counted[shown].values())}


def is_small(flow: Flow) -> bool:
    """Whether the formulas leave it out."""
    return flow.name.partition("/")[2] in SMALL


def order(flow: Flow) -> tuple[int, str, str]:
    """Axes from the innermost."""
    innermost = max(AXES.index(axis) for axis in flow.axis.split("+"))
    return (len(AXES) * len(flow.axis.split("+")) - innermost, flow.axis, flow.name)


def measure(layouts: Iterable[str], families: Sequence[str], levels: Sequence[str]) -> list[dict[str, Any]]:
    """Counted and computed bytes of every layout, family and level."""
    cases: dict[int, dict[tuple[str, str, str], list[str]]] = {}
    for layout in layouts:
        for family in families:
            for level in levels:
                overrides = [*LAYOUTS[layout], f"precision.level={level}"]
                cases.setdefault(world_size(overrides), {})[layout, family, level] = overrides
    results = []
    for ranks, some in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, args=(ranks, some, folder), nprocs=ranks)
            found = [torch.load(f"{folder}/found{ranks}-{rank}.pt") for rank in range(ranks)]
        for case, overrides in some.items():
            counted = [{Flow(*flow): n for flow, n in one[case].items()} for one in found]
            result = compare(tiny_config(case[1], overrides), counted)
            results.append({**dict(zip(("layout", "model", "level"), case, strict=True)), **result})
    return results


def print_measured(results: Sequence[Mapping[str, Any]]) -> None:
    """A table for each layout and model: computed and counted side by side."""
    for layout, model in dict.fromkeys((one["layout"], one["model"]) for one in results):
        some = {one["level"]: one for one in results if (one["layout"], one["model"]) == (layout, model)}
        rows = {level: {(r["axis"], r["traffic"]): r for r in one["rows"]} for level, one in some.items()}
        table = []
        for axis, name in dict.fromkeys(key for of_level in rows.values() for key in of_level):
            found = [of_level.get((axis, name)) for of_level in rows.values()]
            cells = [f"{r[kind]:,.0f}" if r else "" for r in found for kind in ("computed", "counted")]
            worst = max(r["largest_difference"] for r in found if r)
            table.append((f"{axis:8} {name}", *cells, f"{worst:.2%}"))
        small = [cell for one in some.values() for cell in ("", f"{one['small']:,.0f}")]
        table.append((f"{'':8} small (amaxes, norms, loss)", *small, ""))
        header = [f"{level} {kind}" for level in some for kind in ("computed", "counted")]
        print_table((f"{model}, {layout}: bytes a step", *header, "largest difference"), table)
        print()


def levels_of(
    path: Path, overrides: Sequence[str], levels: Sequence[str], dp: int | None
) -> dict[str, Config]:
    """The configuration at each level, in one layout."""
    more = [*overrides] if dp is None else [*overrides, f"parallel.dp={dp}"]
    layout = load_config(path, more).config.parallel
    fixed = [f"parallel.zero={layout.zero}"]
    return {level: load_config(path, [*more, *fixed, f"precision.level={level}"]).config for level in levels}


def compute(configs: Mapping[str, Config]) -> dict[str, Any]:
    """Volumes of all levels on one pipeline rank."""
    first = next(iter(configs.values()))
    dp, pp = data_parallel(first), first.parallel.pp
    per_rank = {level: [volume(s) for s in rank_steps(config, dp=dp)] for level, config in configs.items()}
    rank = most_loaded(next(iter(per_rank.values())))
    flows = sorted({flow for found in per_rank.values() for flow in found[rank]}, key=order)
    return {
        "layout": {"dp": dp, **{axis: getattr(first.parallel, axis) for axis in ("pp", "cp", "tp", "zero")}},
        "micro_batches": accumulation_steps(first, dp),
        "pipeline_rank": rank if pp > 1 else None,
        "rows": [
            {
                "axis": flow.axis,
                "traffic": flow.name,
                "bytes": {level: found[rank].get(flow, 0.0) for level, found in per_rank.items()},
            }
            for flow in flows
        ],
    }


def print_computed(result: Mapping[str, Any]) -> None:
    """The table: rows of each axis and their sum, in GB (10^9 bytes)."""
    layout, rows = result["layout"], result["rows"]
    where = (
        "" if result["pipeline_rank"] is None else f", pipeline rank {result['pipeline_rank']} (sends most)"
    )
    print(
        " x ".join(f"{axis} {layout[axis]}" for axis in AXES) + f", zero {layout['zero']}, "
        f"{result['micro_batches']} micro-batches a step{where}"
    )
    if not rows:
        print("one rank for each part of the model: nothing is sent")
        return
    levels = list(rows[0]["bytes"])
    table = []

    def add(label: str, some: Sequence[Mapping[str, Any]]) -> None:
        total = [sum(row["bytes"][level] for row in some) for level in levels]
        ratio = f"{total[-1] / total[0]:.3f}" if total[0] and total[-1] else ""
        table.append((label, *(f"{n / 1e9:,.4f}" if n else "" for n in total), ratio))

    for axis in dict.fromkeys(row["axis"] for row in rows):
        some = [row for row in rows if row["axis"] == axis]
        for row in some:
            add(f"{axis:8} {row['traffic']}", [row])
        if len(some) > 1:
            add(f"{axis:8} all", some)
    add("everything", rows)
    print_table(("GB a step and rank", *levels, f"{levels[-1]}/{levels[0]}"), table)


def check(results: Sequence[Mapping[str, Any]]) -> None:
    """Fail where a counter and its formula differ."""
    wrong = [
        f"{one['model']}, {one['layout']}, {one['level']}: {row['axis']} {row['traffic']}: computed "
        f"{row['computed']:,.0f}, counted {row['counted']:,.0f}"
        for one in results
        for row in one["rows"]
        if row["largest_difference"] > LIMIT
    ]
    if wrong:
        sys.exit(f"counted and computed bytes differ by more than {LIMIT:.0%}:\n" + "\n".join(wrong))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dp", type=int, help="data-parallel ranks; default: the configuration's, auto is 1")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--measure", action="store_true", help="count on gloo processes")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="layouts of so many processes")
    parser.add_argument("--tiny", action="store_true", help="--measure of one layout on 2 ranks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_intermixed_args()
    if (args.config is None) != (args.measure or args.tiny):
        parser.error("name a configuration, or write --measure or --tiny")
    return args


def main() -> None:
    """Compute or measure, and print."""
    args = arguments()
    result: dict[str, Any]
    if args.config is not None:
        try:
            result = compute(levels_of(args.config, args.overrides, args.levels, args.dp))
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        print_computed(result)
    else:
        layouts = [name for name, overrides in LAYOUTS.items() if world_size(overrides) in args.ranks]
        some = (["tp 2"], ["llama"]) if args.tiny else (layouts, list(FAMILIES))
        result = {"results": measure(*some, MEASURED_LEVELS)}
        print_measured(result["results"])
    if args.json:
        write_json(args.json, {"machine": describe_machine(torch.device("cpu")), **result})
    check(result.get("results", []))


if __name__ == "__main__":
    main()
