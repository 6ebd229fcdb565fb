"""Bytes on the wire of a gradient reduction: counted by the collectives, and by the kernel per socket.

    python tools/bench/wire_bytes.py --ranks 2 4 --json out.json
    python tools/bench/wire_bytes.py --tiny

Processes on this machine reduce one large gradient (default 64 MiB in FP32) over gloo. The collectives say
what they sent; the kernel's counters of each process's own TCP connections (``TCP_INFO``, all ranks together)
say what really went out, with gloo's headers. Other traffic of the machine counts for nothing. Both are shown
in bytes per parameter and rank, beside what BF16 and FP32 all-reduces send.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import describe_machine, print_table, write_json
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import Exchange
from fp8train.comm.shared_scale import SharedScaleReduction
from fp8train.numerics.block_scales import quantize_blocks
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.grids import GridScales
from fp8train.parallel.gradients.integer_storage import Fp8Points, IntegerStorage
from fp8train.parallel.gradients.integer_sum import CodeSum, IntegerSum
from fp8train.parallel.gradients.receivers import Member, Places, row_elements
from fp8train.precision.gradients import Algorithm
from fp8train.precision.number_formats import E4M3

BLOCK = 128


TCP_INFO_BYTES = 216
"""Of ``struct tcp_info`` (linux/tcp.h) up to and with ``tcpi_bytes_retrans``."""
BYTES_SENT = 200
"""Where ``tcpi_bytes_sent`` lies in it; the bytes sent again follow."""


def socket_bytes() -> int:
    """Bytes that this process's open TCP connections have sent, each counted once.

    Raises SystemExit where the kernel does not count them (it has since Linux 4.19).
    """
    sent = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            number = int(entry.name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as one:
                if one.type != socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:  # it was closed meanwhile: the listing's own descriptor is one
            continue
        if len(info) < TCP_INFO_BYTES:
            raise SystemExit("this kernel does not count the bytes of a connection; it takes Linux 4.19")
        first, again = struct.unpack_from("QQ", info, BYTES_SENT)
        sent += first - again
    return sent


def exchange(gradient: Tensor, group: CountedGroup) -> None:
    """All-reduce in FP8 blocks."""
    reduction = Exchange(group, E4M3, purpose="x")
    reduction.start(*quantize_blocks(gradient, E4M3))
    reduction.advance()
    reduction.finish()


def reduce_scatter(gradient: Tensor, group: CountedGroup) -> None:
    """Its first half."""
    reduction = Exchange(group, E4M3, purpose="x")
    reduction.start(*quantize_blocks(gradient, E4M3))
    reduction.sums()


def exact(gradient: Tensor, group: CountedGroup, contributions: int) -> None:
    """Integer sums."""
    scales = GridScales(
        [True],
        [gradient.numel()],
        position={"w": 0},
        micro_batches=contributions * group.size,
        group=group,
        device=gradient.device,
    )
    members = [Member("w", tuple(gradient.shape))]
    places = Places(members, row_elements(members), pad_to=group.size)
    storage = IntegerStorage(places, Fp8Points(), scales=scales, device=gradient.device)
    bucket = Bucket(storage, CodeSum(storage, group) if contributions == 1 else IntegerSum(storage, group))
    bucket.begin()
    bucket.add(0, gradient, first=True)
    bucket.launch()
    bucket.advance()
    bucket.finish()


def shared_scale(gradient: Tensor, group: CountedGroup, algorithm: Algorithm) -> None:
    reduction = SharedScaleReduction([gradient], torch.ones(1), group, algorithm=algorithm, purpose="x")
    reduction.start()
    reduction.finish()


MODES: dict[str, Callable[[Tensor, CountedGroup], Any]] = {
    "FP32 all-reduce": lambda g, group: group.all_reduce(g.clone(), purpose="x")(),
    "BF16 all-reduce": lambda g, group: group.all_reduce(g.bfloat16(), purpose="x")(),
    "exchange, all-reduce": exchange,
    "exchange, reduce-scatter": reduce_scatter,
    "shared_scale ring": lambda g, group: shared_scale(g, group, "ring"),
    "shared_scale tree": lambda g, group: shared_scale(g, group, "tree"),
    "exact, one micro-batch a rank": lambda g, group: exact(g, group, 1),
    "exact, several": lambda g, group: exact(g, group, 2),
}


def run_rank(rank: int, ranks: int, elements: int, folder: str) -> None:
    """One process: every mode once; rank 0 saves (counted by all ranks, seen on the sockets)."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    gradient = torch.randn(elements // BLOCK, BLOCK, generator=torch.Generator().manual_seed(rank)) * 1e-3
    found = {}
    for name, reduce in MODES.items():
        group = CountedGroup(dist.group.WORLD)
        reduce(gradient[: BLOCK * ranks], CountedGroup(dist.group.WORLD))  # connections are made now
        dist.barrier()
        before = socket_bytes()
        reduce(gradient, group)
        dist.barrier()  # what this rank still has to send has gone when all have received
        sums = torch.tensor([sum(group.sent.values()), socket_bytes() - before], dtype=torch.float64)
        dist.all_reduce(sums)
        counted, seen = sums.tolist()
        found[name] = (counted, seen)
        dist.barrier()
    if rank == 0:
        torch.save(found, f"{folder}/found{ranks}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--mib", type=float, default=64.0, help="size of the gradient in FP32")
    parser.add_argument("--tiny", action="store_true", help="2 ranks, 4 MiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.ranks, args.mib = [2], 4.0
    step = BLOCK * max(args.ranks) * 16
    elements = int(args.mib * 2**20 / 4) // step * step
    rows, result = [], []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, args=(ranks, elements, folder), nprocs=ranks)
            found = torch.load(f"{folder}/found{ranks}.pt")
        bf16 = found["BF16 all-reduce"][0]
        for name, (counted, seen) in found.items():
            per_parameter = counted / ranks / elements
            result.append(
                {
                    "ranks": ranks,
                    "mode": name,
                    "counted_bytes_per_parameter_and_rank": per_parameter,
                    "sockets_over_counted": seen / counted,
                    "over_bf16_all_reduce": counted / bf16,
                }
            )
            rows.append(
                (name, str(ranks), f"{per_parameter:.3f}", f"{seen / counted:.3f}", f"{counted / bf16:.3f}")
            )
    header = (
        "reduction",
        "ranks",
        "bytes/param and rank, counted",
        "sockets / counted",
        "/ BF16 all-reduce",
    )
    print_table(header, rows)
    if args.json:
        machine = describe_machine(torch.device("cpu"))
        write_json(args.json, {"machine": machine, "elements": elements, "results": result})


if __name__ == "__main__":
    main()
