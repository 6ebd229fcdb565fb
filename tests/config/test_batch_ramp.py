"""The ramp of batch sizes: what it counts, and what does not go with it."""

from __future__ import annotations

import pytest

from fp8train.config.batch_sizes import BatchSizes
from fp8train.config.errors import ConfigError
from fp8train.config.world import check_world
from tests.training.tiny import alone, losses, tiny_config

RAMP = "train.batch_size_ramp=[{steps: 2, global_batch_size: 2}, {steps: 3, global_batch_size: 4}]"


def test_steps_of_a_number_of_tokens() -> None:
    """By counting, with sequences of 16."""
    sizes = BatchSizes(8, [(2, 2), (3, 4)])
    for tokens in (1, 32, 33, 64, 65, 256, 257, 1000, 12345):
        step, used = 0, 0
        while used < tokens:
            used, step = used + sizes.size(step) * 16, step + 1
        assert sizes.steps_for(tokens, 16) == step
    config = tiny_config([RAMP, "train.steps=null", "train.tokens=1000"])
    assert config.total_steps == sizes.steps_for(1000, 16) == 11


def test_a_run_with_a_ramp_learns() -> None:
    config = tiny_config([RAMP, "precision.level=O2"])
    assert [config.train.batch_sizes.size(step) for step in range(6)] == [2, 2, 4, 4, 4, 8]
    values, trainer = losses(config, alone(), 8)
    assert values[-1] < 0.9 * values[0]
    assert trainer.updates == 8


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.batch_size_ramp=[{steps: 2, global_batch_size: 8}]"], "must grow"),
        ([RAMP, "train.micro_batch_size=4"], r"multiples of micro_batch_size \(4\)"),
        (
            ["train.batch_size_ramp=[{steps: 2, global_batch_size: 4}, {steps: 2, global_batch_size: 2}]"],
            "must grow",
        ),
        ([RAMP, "precision.recipe=umup"], "factors that depend on the global batch size"),
    ],
)
def test_what_does_not_fit(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tiny_config(overrides)


def test_every_stage_must_divide() -> None:
    check_world(tiny_config([RAMP]), 2)
    with pytest.raises(ConfigError, match=r"batch_size_ramp: 2 samples must be a multiple .* 1 \* 4 = 4"):
        check_world(tiny_config([RAMP]), 4)
    with pytest.raises(ConfigError, match=r"batch_size_ramp: 2 samples .*schedule: 1f1b runs"):
        check_world(tiny_config([RAMP, "parallel.pp=2"]), 4)
