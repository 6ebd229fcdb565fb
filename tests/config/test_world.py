"""Arithmetic of processes and batches, with messages that name numbers and legal values."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.cli import run_command
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import load_config, resolve_mapping
from fp8train.config.world import accumulation_steps, check_world, data_parallel_size
from tests.config.examples import MINIMAL, minimal, write


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "steps"),
    [(8, 4, 1, 2), (8, 4, 2, 1), (48, 2, 8, 3), (6, 1, 6, 1)],
)
def test_legal_layouts(global_batch: int, micro_batch: int, world: int, steps: int) -> None:
    overrides = [f"train.global_batch_size={global_batch}", f"train.micro_batch_size={micro_batch}"]
    config = resolve_mapping(minimal(), overrides).config
    assert check_world(config, world) == (world, steps)
    assert steps * micro_batch * world == global_batch


@pytest.mark.parametrize(("world", "legal"), [(3, "12"), (4, "16")])
def test_batch_that_ranks_do_not_divide(world: int, legal: str) -> None:
    config = resolve_mapping(minimal()).config
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(config, world)
    assert str(caught.value) == (
        f"train.global_batch_size (8) must be a multiple of train.micro_batch_size * dp = 4 * {world} "
        f"= {4 * world}; "
        f"nearest legal values: {legal}"
    )


def test_batch_between_two_legal_values_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    resolved = load_config(path, ["train.micro_batch_size=1"])
    with pytest.raises(ConfigError) as caught:
        check_world(resolved.config, 3, origins=resolved.origins)
    assert str(caught.value) == (
        f"{path}:13: train.global_batch_size (8) must be a multiple of train.micro_batch_size * dp = "
        "1 * 3 = 3; "
        "nearest legal values: 6 or 9"
    )


def test_nodes_that_these_ranks_do_not_divide_into() -> None:
    overrides = ["precision.level=O2", "precision.gradient.fp8.node_size=4", "train.micro_batch_size=1"]
    resolved = resolve_mapping(minimal(), overrides)
    assert check_world(resolved.config, 8, origins=resolved.origins) == (8, 1)
    with pytest.raises(ConfigError) as caught:
        check_world(resolved.config, 2, origins=resolved.origins)
    assert str(caught.value) == (
        "command line: precision.gradient.fp8.node_size (4) must divide the data-parallel ranks (2); legal: "
        "1 or 2"
    )


def test_the_command_checks_a_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, MINIMAL)
    assert run_command(["config", str(path), "--world", "2"]) == 0
    assert capsys.readouterr().err == ""
    assert run_command(["config", str(path), "--world", "3"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:13: train.global_batch_size (8) must be")


def test_dp_must_equal_the_world_size() -> None:
    resolved = resolve_mapping(minimal(), ["parallel.dp=4", "train.micro_batch_size=2"])
    assert data_parallel_size(resolved.config, 4) == 4
    with pytest.raises(ConfigError) as caught:
        check_world(resolved.config, 2, origins=resolved.origins)
    assert str(caught.value) == (
        "command line: parallel.dp * pp * cp * tp = 4 * 1 * 1 * 1 must equal the number of processes (2): "
        "write parallel.dp: auto or 2, or start 4 processes (torchrun --nproc-per-node=4 on one node)"
    )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.dp=4"], r"train\.global_batch_size \(8\) must be a multiple of .* = 4 \* 4 = 16"),
        (["parallel.pp=2", "train.micro_batch_size=8"], r"1f1b needs at least parallel\.pp = 2 micro"),
        (["parallel.dp=2", "parallel.pp=2"], r"1f1b needs at least parallel\.pp = 2 micro-batches"),
    ],
)
def test_what_no_number_of_processes_could_run_is_refused_by_the_file(
    overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve_mapping(minimal(), overrides)


def test_what_some_number_of_processes_could_run_is_not() -> None:
    """Three rounds of two stages fit one data-parallel rank, not three."""
    schedule = ["parallel.pp=2", "parallel.pipeline.schedule=interleaved_1f1b", "model.num_layers=4"]
    config = resolve_mapping(minimal(), [*schedule, "train.micro_batch_size=2"]).config
    assert check_world(config, 2) == (1, 4)
