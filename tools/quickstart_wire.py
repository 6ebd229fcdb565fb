"""What two data-parallel ranks send each other for gradients, counted by their collectives.

The quick start (tools/quickstart.py) trains in one process, which sends nothing. This trains each of its
configurations for two more steps in two processes on CPUs and counts. One job does all, because starting
processes takes longer than the steps. Rank 0 prints one JSON object: bytes that a rank sends a step, per
parameter, by name.

    torchrun --nproc-per-node=2 tools/quickstart_wire.py '{"NAME": ["CONFIG.yaml", "section.key=value", ..]}'
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch

from fp8train.comm.processes import Processes, processes
from fp8train.config.resolve import load_config
from fp8train.data.loading import open_data
from fp8train.step.trainer import Trainer

STEPS = 2


def main() -> None:
    runs = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with processes("cpu") as ranks:
        sent = {
            name: bytes_per_parameter(ranks, path, overrides) for name, (path, *overrides) in runs.items()
        }
        if ranks.rank == 0:
            print(json.dumps(sent))


def bytes_per_parameter(ranks: Processes, path: str, overrides: list[str]) -> float:
    """Of the hidden linears' gradients where these travel by themselves (in FP8), else of all gradients."""
    config = load_config(path, [*overrides, "train.micro_batch_size=1"]).config
    data = open_data(
        config.data,
        vocab_size=config.model.vocab_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=ranks.dp.rank,
        dp_size=ranks.dp.size,
        seed=config.run.seed,
        total_steps=config.total_steps,
    )
    trainer = Trainer(config, ranks, vocab_size=data.vocab_size)
    before = by_purpose(trainer)
    for step in range(STEPS):
        trainer.step(step, data.train.batch(step))
    sent = by_purpose(trainer) - before
    if "gradient_fp8_plan" in sent:
        count = sum(linear.weight.numel() for linear in trainer.outline.linears().values())
        return sent["gradient_fp8_plan"] / STEPS / count
    return sent["gradient"] / STEPS / sum(parameter.numel() for parameter in trainer.outline.parameters())


def by_purpose(trainer: Trainer) -> Counter[str]:
    """Bytes that this rank has sent, by what for; the groups are those of all runs, so they count on."""
    sent: Counter[str] = Counter()
    for name, count in trainer.sent_bytes().items():
        sent[name.rpartition("/")[2]] += count
    return sent


if __name__ == "__main__":
    main()
