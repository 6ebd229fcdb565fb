"""How much of a gradient survives its reduction: signal-to-noise ratio of every mode on real gradients.

    python tools/bench/reduce_snr.py --data data/stdlib/v12288 --json out.json
    python tools/bench/reduce_snr.py --tiny

A model is trained for a few steps; then the gradients of many micro-batches, one for each simulated rank,
are captured in FP32 for all weights of the FP8 plan. For each number of ranks N and each mode they are
reduced as that mode does, and compared with the FP64 sum:

* SNR, pooled by energy over all tensors, and its 5 % quantile and minimum over tensors;
* flushed: share of non-zero sums that came out as zero; saturated: share of sums at the format's maximum.

``exchange``, ``shared_scale`` and ``exact`` are computed in one process for any N, and for the numbers of
``--gloo`` also by that many processes over gloo, whose result must have the same bits.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import describe_machine, print_table, write_json
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import Exchange, padded_blocks
from fp8train.comm.fp8_sum import fold_ring, fold_tree, fold_wide
from fp8train.comm.processes import Processes
from fp8train.comm.shared_scale import SharedScaleReduction, shared_scales
from fp8train.config.resolve import load_config
from fp8train.data.loading import open_data
from fp8train.numerics.block_scales import as_blocks, dequantize_blocks, from_blocks, quantize_blocks
from fp8train.numerics.cast import amax_of, cast, uncast
from fp8train.numerics.scale import exponent_from_amax, power_of_two
from fp8train.precision.number_formats import E4M3
from fp8train.precision.scale_blocks import block_size
from fp8train.step.trainer import Trainer

SMALL = Path(__file__).parents[2] / "configs" / "small" / "llama_fp8.yaml"
Gradients = dict[str, Tensor]  # fqn -> FP32 [ranks, rows, columns]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quality:
    """One mode on one number of ranks."""

    snr_db: float
    snr_p5_db: float
    snr_min_db: float
    flushed: float
    saturated: float


def exchange_sum(values: Tensor) -> Tensor:
    """Reduce-scatter form: decoded contributions added in FP32 in rank order. [N, ..] -> [..]."""
    block = block_size(values.shape[-1])
    total: Tensor | None = None
    for value in values:
        decoded = dequantize_blocks(*quantize_blocks(as_blocks(value, block), E4M3))
        total = decoded if total is None else total.add_(decoded)
    assert total is not None
    return from_blocks(total, values.shape[1:])


def recast(total: Tensor) -> Tensor:
    """The second cast of an all-reduce."""
    block = block_size(total.shape[-1])
    return from_blocks(dequantize_blocks(*quantize_blocks(as_blocks(total, block), E4M3)), total.shape)


def hierarchical(values: Tensor, *, node: int, between: str) -> Tensor:
    """Nodes of ``node`` ranks first."""
    inside = [exchange_sum(part) for part in values.split(node)]
    if between == "fp8":
        return recast(exchange_sum(torch.stack(inside)))
    total = torch.zeros_like(inside[0])
    for part in inside:
        total += part.bfloat16().float()
    return recast(total)


def shared(values: Tensor, fold: Callable[[Tensor], Tensor], mu: float) -> Tensor:
    """FP8-LM's sum with one scale per tensor and a fixed μ."""
    scale, scale_inv = shared_scales(amax_of(values)[None], torch.tensor([mu]), E4M3)
    codes = cast(values.reshape(len(values), -1), E4M3, scale)
    return uncast(fold(codes), scale_inv[0]).view(values.shape[1:])


def exact(values: Tensor) -> Tensor:
    """Integer sums on a grid fixed before: here from the same step's amax, as in a steady state."""
    scale = power_of_two(exponent_from_amax(amax_of(values), max_exponent=E4M3.max_exponent, margin=3))
    integers = (cast(values, E4M3, scale).float() * 512).to(torch.int32)
    return (integers.sum(dim=0, dtype=torch.int32).double() / 512 / scale.double()).float()


def bf16_ring(values: Tensor) -> Tensor:
    """A ring all-reduce that adds in BF16."""
    total = values[0].bfloat16()
    for value in values[1:]:
        total = total + value.bfloat16()
    return total.float()


def modes(ranks: int) -> dict[str, Reduce]:
    """What is compared at this number of ranks."""
    found: dict[str, Reduce] = {
        "exchange, reduce-scatter": exchange_sum,
        "exchange, all-reduce": lambda v: recast(exchange_sum(v)),
    }
    if ranks >= 4:
        node = min(8, ranks // 2)
        found |= {
            f"hierarchical {node} + FP8": lambda v: hierarchical(v, node=node, between="fp8"),
            f"hierarchical {node} + BF16": lambda v: hierarchical(v, node=node, between="bf16"),
        }
    for name, mu in (("1", 1.0), ("1/sqrt(N)", ranks**-0.5), ("1/N", 1 / ranks)):
        found[f"shared_scale ring, mu={name}"] = lambda v, mu=mu: shared(v, fold_ring, mu)
    found |= {
        "shared_scale tree, mu=1/N": lambda v: shared(v, fold_tree, 1 / ranks),
        "shared_scale FP32 sum, mu=1/N": lambda v: shared(v, fold_wide, 1 / ranks),
        "exact": exact,
        "BF16 ring": bf16_ring,
    }
    return found


def quality(gradients: Gradients, ranks: int, reduce: Reduce) -> Quality:
    """Reduce every tensor over its first ``ranks`` gradients and compare."""
    signal = noise = 0.0
    flushed = saturated = nonzero = 0
    per_tensor = []
    for values in gradients.values():
        part = values[:ranks]
        truth, got = part.double().sum(dim=0), reduce(part).double()
        energy, error = float(truth.square().sum()), float((got - truth).square().sum())
        signal, noise = signal + energy, noise + error
        per_tensor.append(energy / max(error, 1e-300))
        nonzero += int((truth != 0).sum())
        flushed += int(((truth != 0) & (got == 0)).sum())
        top = got.abs().max()
        saturated += int((got.abs() == top).sum()) - 1
    db = 10 * torch.log10(torch.tensor(per_tensor, dtype=torch.float64))
    return Quality(
        float(10 * torch.log10(torch.tensor(signal / max(noise, 1e-300)))),
        float(db.quantile(0.05)),
        float(db.min()),
        flushed / nonzero,
        saturated / nonzero,
    )


def capture(args: argparse.Namespace, count: int) -> Gradients:
    """Train a little, then take the gradients of ``count`` micro-batches one by one."""
    overrides = [f"data.prefix={args.data}", "train.steps=1000000", "train.global_batch_size=1"]
    overrides += ["train.micro_batch_size=1", "train.eval_interval=0", *args.overrides]
    config = load_config(args.config, overrides).config
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    data = open_data(
        config.data,
        vocab_size=config.model.vocab_size,
        global_batch_size=1,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        seed=config.run.seed,
        total_steps=args.steps + count,
    )
    processes = Processes(torch.device("cpu"), 1, 0, CountedGroup(None), None)
    trainer = Trainer(config, processes, vocab_size=data.vocab_size)
    for step in range(args.steps):
        trainer.step(step, data.train.batch(step))
    weights = [fqn for fqn, spec in trainer.model.specs.items() if spec.in_fp8_plan]
    gradients: dict[str, list[Tensor]] = {fqn: [] for fqn in weights}
    for i in range(count):
        batch = data.train.batch(args.steps + i)[0]
        trainer.store.begin_step(1)
        (
            trainer.model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) / batch[:, 1:].numel()
        ).backward()
        trainer.store.finish()
        for fqn in weights:
            shape = trainer.model.specs[fqn].local_shape
            values = trainer.store.reader(fqn).chunk(0, math.prod(shape))
            gradients[fqn].append(values.view(shape).clone())
    return {fqn: torch.stack(values) for fqn, values in gradients.items()}


def random_gradients(count: int) -> Gradients:
    """For ``--tiny``: no model, no data."""
    torch.manual_seed(0)
    shared_part = torch.randn(16, 64)
    return {"w": torch.stack([shared_part + 2 * torch.randn(16, 64).exp() for _ in range(count)])}


def gloo_rank(rank: int, ranks: int, folder: str) -> None:
    """One process: reduce all tensors over gloo and save the results of rank 0."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    group = CountedGroup(dist.group.WORLD)
    gradients: Gradients = torch.load(f"{folder}/gradients.pt")
    results = {}
    for fqn, values in gradients.items():
        own, block = values[rank], block_size(values.shape[-1])
        blocks = as_blocks(own, block)
        padding = torch.zeros(padded_blocks(len(blocks), ranks) - len(blocks), block)
        exchange = Exchange(group, E4M3, purpose="gradient")
        exchange.start(*quantize_blocks(torch.cat((blocks, padding)), E4M3))
        exchange.advance()
        total = dequantize_blocks(*exchange.finish())[: len(blocks)]
        results[f"exchange/{fqn}"] = from_blocks(total, own.shape)
        for algorithm in ("ring", "tree"):
            mus = torch.full((1,), 1 / ranks)
            reduction = SharedScaleReduction([own], mus, group, algorithm=algorithm)  # type: ignore[arg-type]
            reduction.start()
            results[f"{algorithm}/{fqn}"] = reduction.finish().values(0).view(own.shape)
    if rank == 0:
        torch.save(results, f"{folder}/result{ranks}.pt")
    dist.destroy_process_group()


def check_against_gloo(gradients: Gradients, ranks: int) -> int:
    """Reduce with ``ranks`` processes; the number of tensors and modes whose bits agree with the simulation.

    Raises:
        SystemExit: bits differ.
    """
    simulated: dict[str, Reduce] = {
        "exchange": lambda v: recast(exchange_sum(v)),
        "ring": lambda v: shared(v, fold_ring, 1 / ranks),
        "tree": lambda v: shared(v, fold_tree, 1 / ranks),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save({fqn: values[:ranks] for fqn, values in gradients.items()}, f"{folder}/gradients.pt")
        mp.spawn(gloo_rank, args=(ranks, folder), nprocs=ranks)
        results = torch.load(f"{folder}/result{ranks}.pt")
    for name, got in results.items():
        mode, _, fqn = name.partition("/")
        if not torch.equal(got, simulated[mode](gradients[fqn][:ranks])):
            raise SystemExit(f"{name} on {ranks} gloo ranks differs from its simulation")
    return len(results)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=SMALL)
    parser.add_argument("--data", default="data/stdlib/v12288", help="dataset prefix")
    parser.add_argument("--steps", type=int, default=50, help="training steps before the capture")
    parser.add_argument("--ranks", default="2,4,8,16,32,64", help="numbers of ranks")
    parser.add_argument("--gloo", default="2,4,8", help="numbers of ranks to run over gloo too; empty: none")
    parser.add_argument(
        "--tiny", action="store_true", help="random numbers instead of gradients, 2 and 4 ranks"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    if args.tiny:
        args.ranks, args.gloo = "2,4", "2"
    counts = [int(n) for n in args.ranks.split(",")]
    gradients = random_gradients(max(counts)) if args.tiny else capture(args, max(counts))
    elements = sum(values[0].numel() for values in gradients.values())
    print(f"{len(gradients)} tensors, {elements:,} elements, {max(counts)} gradients of each")
    rows, result = [], []
    for ranks in counts:
        for name, reduce in modes(ranks).items():
            q = quality(gradients, ranks, reduce)
            result.append({"ranks": ranks, "mode": name, **q.__dict__})
            shares = (f"{100 * q.flushed:.3f}", f"{100 * q.saturated:.4f}")
            rows.append(
                (name, str(ranks), *(f"{db:.1f}" for db in (q.snr_db, q.snr_p5_db, q.snr_min_db)), *shares)
            )
    print_table(
        ("mode", "ranks", "SNR dB", "5 % of tensors", "worst tensor", "flushed %", "at maximum %"), rows
    )
    checked = {}
    for ranks in (int(n) for n in args.gloo.split(",") if n):
        checked[ranks] = check_against_gloo(gradients, ranks)
        print(f"gloo, {ranks} ranks: {checked[ranks]} reductions have the bits of their simulation")
    if args.json:
        machine: dict[str, Any] = describe_machine(torch.device("cpu"))
        write_json(args.json, {"machine": machine, "elements": elements, "gloo": checked, "results": result})


if __name__ == "__main__":
    main()
