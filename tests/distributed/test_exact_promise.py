"""What ``exact`` needs to keep its promise is checked: over the ranks at the start, and on resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.parallel.gradients.grids import GridScales
from fp8train.step.trainer import Trainer
from tests.checkpoint.loading import load_checkpoint
from tests.distributed.test_levels import EXACT, digest
from tests.training.tiny import VOCAB, alone, batches, tiny_config


def build(group: dist.ProcessGroup, rank: int, world_size: int, differing: str) -> str:
    """Runs in the pool: the error of building a trainer on ranks of which rank 1 differs."""
    overrides, capability = list(EXACT), torch.backends.cpu.get_cpu_capability
    if rank == 1 and differing == "threads":
        torch.set_num_threads(3)
    if rank == 1 and differing == "micro_batch_size":
        overrides.append("train.micro_batch_size=2")
    if rank == 1 and differing == "capability":
        torch.backends.cpu.get_cpu_capability = lambda: "Z80"
    try:
        Trainer(tiny_config(overrides), joined_processes(torch.device("cpu")), vocab_size=VOCAB)
    except ConfigError as error:
        return str(error)
    finally:
        torch.set_num_threads(1)
        torch.backends.cpu.get_cpu_capability = capability
    return ""


@pytest.mark.parametrize(
    ("differing", "named"),
    [
        ("nothing", ""),
        ("threads", "run.threads differs: 1 on ranks 0, 2, 3; 3 on rank 1;"),
        ("micro_batch_size", "train.micro_batch_size differs: 1 on ranks 0, 2, 3; 2 on rank 1;"),
        ("capability", f"{torch.backends.cpu.get_cpu_capability()} on ranks 0, 2, 3; Z80 on rank 1;"),
    ],
)
def test_ranks_that_differ_are_named_on_every_rank(gloo_pool, differing: str, named: str) -> None:
    messages = gloo_pool.run(build, 4, differing)
    assert len(set(messages)) == 1
    assert named in messages[0]
    assert bool(messages[0]) == bool(named)


@pytest.mark.parametrize(
    ("overrides", "threads", "named"),
    [
        (["train.micro_batch_size=2"], 1, r"restore train.micro_batch_size=1 \(now 2\);"),
        (["train.global_batch_size=16"], 1, r"restore train.global_batch_size=8 \(now 16\);"),
        ([], 2, r"restore run.threads=1 \(now 2\);"),
        (
            ["train.micro_batch_size=4", "train.global_batch_size=4"],
            1,
            r"restore train.micro_batch_size=1 \(now 4\), train.global_batch_size=8 \(now 4\);",
        ),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_resume_that_changes_what_bits_depend_on_is_refused(
    overrides: list[str], threads: int, named: str
) -> None:
    saved = Trainer(tiny_config(EXACT), alone(), vocab_size=VOCAB).state_meta()
    torch.set_num_threads(threads)
    changed = Trainer(tiny_config([*EXACT, *overrides]), alone(), vocab_size=VOCAB)
    with pytest.raises(ValueError, match=named):
        changed.check_meta(saved)
    changed.check_meta(changed.state_meta())


def test_other_reductions_may_change_the_batch() -> None:
    saved = Trainer(tiny_config(["precision.level=O2"]), alone(), vocab_size=VOCAB).state_meta()
    changed = tiny_config(["precision.level=O2", "train.micro_batch_size=2"])
    Trainer(changed, alone(), vocab_size=VOCAB).check_meta(saved)


def test_more_micro_batches_than_int32_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 9362 micro-batches"):
        tiny_config([*EXACT, "train.global_batch_size=9363"])


def count_saturated(group: dist.ProcessGroup, rank: int, world_size: int) -> list[int]:
    """Runs in the pool: the count after an applied step, one that was not, and another applied one."""
    scales = GridScales(
        [True],
        [9],
        position={"w": 0},
        micro_batches=world_size,
        group=CountedGroup(group),
        device=torch.device("cpu"),
    )
    counts = []
    for outside, applied in ((3 + rank, True), (5, False), (2 * rank, True)):
        scales.begin_step()
        scales.step.count_outside(torch.arange(9) < outside)
        scales.end_step()
        if applied:
            scales.commit()
        counts.append(int(scales.saturated))
    return counts


def test_saturated_elements_are_those_of_all_ranks(gloo_pool) -> None:
    assert gloo_pool.run(count_saturated, 3) == [[12, 12, 18]] * 3


def train_with_a_jump(
    processes: Processes, first: int, last: int, folder: Path, load: bool
) -> tuple[str, list[float], float]:
    """Steps from and to a checkpoint; in step 2 the loss is 100 times as large: (digest, which steps were
    repeated, elements that saturated)."""
    config = tiny_config(EXACT)
    trainer, data = Trainer(config, processes, vocab_size=VOCAB), batches(config, processes)
    if load:
        loaded = load_checkpoint(
            folder / f"step_{first:08d}", trainer.state_tensors(), group=processes.control
        )
        trainer.check_meta(loaded.meta)
        trainer.restored(loaded.meta)
    forward = trainer.model.forward
    repeated = [0.0]
    for step in range(first, last):
        factor = 100 if step == 2 else 1
        trainer.model.forward = lambda *args, f=factor: forward(*args) * f  # type: ignore[method-assign]
        assert trainer.step(step, data.batch(step)).applied
        repeated.append(trainer.precision_metrics()["fp8/gradient_repeated_steps"])
    save_checkpoint(
        folder,
        last,
        trainer.state_tensors(),
        meta=trainer.state_meta(),
        rank_state={},
        group=processes.control,
        keep_last=5,
    )
    saturated = trainer.precision_metrics()["fp8/gradient_saturated_elements"]
    return digest(trainer), [after - before for before, after in pairwise(repeated)], saturated


def jump_in_pool(
    group: dist.ProcessGroup, rank: int, world_size: int, first: int, last: int, folder: Path, load: bool
) -> tuple[str, list[float], float]:
    """Runs in the pool."""
    return train_with_a_jump(joined_processes(torch.device("cpu")), first, last, folder, load)


@pytest.mark.usefixtures("one_thread")
def test_a_jump_repeats_its_step_on_any_number_of_ranks_and_nothing_saturates(
    gloo_pool, tmp_path: Path
) -> None:
    final, repeated, saturated = train_with_a_jump(alone(), 0, 6, tmp_path / "whole", False)
    assert repeated[:2] == [1.0, 0.0], "the first step has no grids, the second has"
    assert repeated[2] == 1.0, "gradients of 100 times the size do not fit"
    assert saturated == 0.0
    for _, before, _ in gloo_pool.run(jump_in_pool, 2, 0, 4, tmp_path / "moved", False):
        assert before == repeated[:4]
    for result in gloo_pool.run(jump_in_pool, 4, 4, 6, tmp_path / "moved", True):
        assert result == (final, repeated[4:], saturated)
