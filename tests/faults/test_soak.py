"""What the soak draws is a legal configuration, and the same for a seed. That it passes takes minutes:
``python tools/soak.py``."""

from __future__ import annotations

import random
from pathlib import Path

from fp8train.config.resolve import resolve_mapping
from fp8train.config.world import check_world
from tests.config.examples import minimal
from tools.soak import EVALUATE, INSIDE, STEPS, Life, as_override, draw, flipped_bit, row


def test_what_is_drawn_is_accepted() -> None:
    kinds = set()
    for seed in range(30):
        faults = draw(random.Random(seed), 2, disk=True)
        assert faults == draw(random.Random(seed), 2, disk=True)
        settings = [f"train.steps={STEPS}", f"train.eval_interval={EVALUATE}", "train.micro_batch_size=2"]
        config = resolve_mapping(minimal(), [*settings, as_override(faults)]).config
        check_world(config, 2)
        assert INSIDE / 2 < len(config.debug.fault_injection) <= INSIDE
        kinds |= {fault.kind for fault in config.debug.fault_injection}
    assert {"sigkill", "sigterm", "sigstop", "hang", "gil", "disk_full", "oom_host"} <= kinds


def test_one_bit_is_flipped(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(range(100)))
    assert flipped_bit(tmp_path, random.Random(3)) == "flipped bit in shard"
    pairs = zip((tmp_path / "shard").read_bytes(), range(100), strict=True)
    assert sum((new ^ old).bit_count() for new, old in pairs) == 1


def test_a_life_is_a_line() -> None:
    life = Life("001_O2_sync", 3, ["sigkill_step7"], "failed", [-9, None], 4.2, 6, 7, 1, "a rank did not end")
    assert row(life).split() == [
        *("001_O2_sync", "3", "sigkill_step7", "failed", "-9,?", "4.2", "6", "7", "1"),
        *("WRONG:", "a", "rank", "did", "not", "end"),
    ]
