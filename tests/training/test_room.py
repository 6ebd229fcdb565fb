"""A model that cannot be in this machine's memory is refused before anything is made of it."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from fp8train.config.environment import World
from fp8train.config.errors import ConfigError
from fp8train.planning.rank_bytes import RankBytes
from fp8train.training.room import check_room, memory_of_machine
from tests.training.tiny import tiny_config


def check(have: int, world: World = World(), **model: int) -> None:  # noqa: B008 - frozen
    config = tiny_config()
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    check_room(config, world, 128, dp=world.size, micro_batches=1, have=have)


def test_the_smallest_machine_that_holds_it() -> None:
    config = tiny_config()
    stored = RankBytes(config, 128, dp=1, micro_batches=1).largest().model.total
    tokens = config.train.micro_batch_size * config.data.seq_length
    needed = stored + tokens * config.model.hidden_size * {"bf16": 2, "fp32": 4}[config.precision.compute]
    check(needed)
    with pytest.raises(ConfigError, match="weights, gradients and optimizer states of a rank take") as caught:
        check(needed - 1)
    assert len(str(caught.value).splitlines()) <= 5
    assert f"model.num_layers={config.model.num_layers}, " in str(caught.value)
    with pytest.raises(ConfigError, match="of 2 ranks take"):
        check(2 * needed - 1, World(2, 0, 2, 0))


def test_ten_thousand_layers_are_counted_quickly() -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"model\.num_layers=10000"):
        check(2**40, num_layers=10_000, hidden_size=2**16, ffn_hidden_size=2**18)
    assert time.process_time() - began < 5


def test_the_memory_of_the_machine() -> None:
    total = 1024 * int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 2**28 < memory_of_machine() < 8 * total


def test_a_limit_of_the_process_is_that_of_each_rank() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, before[1]))
    try:
        check(2**60, World(2, 0, 2, 0), hidden_size=2**14, ffn_hidden_size=2**14)
        with pytest.raises(ConfigError, match=r"of a rank take .*, and this machine gives 64.0 GiB"):
            check(2**60, World(2, 0, 2, 0), hidden_size=2**16, ffn_hidden_size=2**16)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
