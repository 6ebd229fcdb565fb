"""What stays of old checkpoints, and that a checkpoint with something left out never counts."""

from pathlib import Path

import pytest
import torch

from fp8train.checkpoint.catalog import find_checkpoint, step_of, write_pointer
from fp8train.checkpoint.errors import CorruptCheckpointError
from fp8train.checkpoint.planners import LogicalSavePlanner, write_items
from fp8train.checkpoint.retention import Retention, retain
from fp8train.checkpoint.save import save_checkpoint


def _save(root: Path, step: int, loss: object = None, **rules: int) -> Path:
    rules = {"keep_last": 99, **rules}
    tensors = {"x": torch.full((8,), float(step))}
    return save_checkpoint(root, step, tensors, meta={"eval_loss": loss}, rank_state={}, group=None, **rules)


def _steps(root: Path) -> list[int]:
    return sorted(step for path in root.iterdir() if (step := step_of(path)) is not None)


LOSSES = {10: 3.0, 20: 2.5, 30: None, 40: "nan", 50: 2.5, 60: 2.75, 70: 2.9}


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Retention(1), [70]),
        (Retention(2), [60, 70]),
        (Retention(1, keep_every=20), [20, 40, 60, 70]),
        (Retention(1, keep_every=35), [70]),
        (Retention(1, keep_best=1), [50, 70]),  # of 20 and 50 the newer
        (Retention(1, keep_best=2), [20, 50, 70]),
        (Retention(1, keep_best=3), [20, 50, 60, 70]),
        (Retention(1, keep_best=9), [10, 20, 50, 60, 70]),  # never one without a loss
        (Retention(2, keep_every=30, keep_best=1), [30, 50, 60, 70]),
    ],
)
def test_rules(tmp_path: Path, rules: Retention, kept: list[int]) -> None:
    for step, loss in LOSSES.items():
        _save(tmp_path, step, loss)
    deleted = retain(tmp_path, rules, newest=70)
    assert _steps(tmp_path) == kept
    assert sorted(step_of(path) or 0 for path in deleted) == sorted(set(LOSSES) - set(kept))


def test_the_pointers_target_and_later_steps_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _save(tmp_path, step, float(step))
    write_pointer(tmp_path, tmp_path / "step_00000010")
    retain(tmp_path, Retention(1), newest=30)
    assert _steps(tmp_path) == [10, 30, 40]


def test_a_save_applies_the_rules(tmp_path: Path) -> None:
    for step, loss in ((1, 5.0), (2, 4.0), (3, 4.5), (4, 6.0), (5, 7.0)):
        _save(tmp_path, step, loss, keep_last=1, keep_every=3, keep_best=1)
    assert _steps(tmp_path) == [2, 3, 5]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"step": 10}', b'{"step": 1, "meta": 3}'])
def test_a_damaged_description_has_no_loss(tmp_path: Path, content: bytes) -> None:
    for step in (10, 20, 30):
        _save(tmp_path, step, float(step))
    (tmp_path / "step_00000010" / "meta.json").write_bytes(content)
    retain(tmp_path, Retention(1, keep_best=1), newest=30)
    assert _steps(tmp_path) == [20, 30]


def test_a_plan_that_leaves_out_a_tensor_never_becomes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stale cached plan does: everything is written consistently, but not everything."""
    _save(tmp_path, 1)

    def stale(planner: LogicalSavePlanner) -> object:
        planner._tensors = {name: one for name, one in planner._tensors.items() if name != "new"}
        return type(plan)(write_items(planner._tensors))

    plan = LogicalSavePlanner(lambda needed: None, lambda: None).create_local_plan()
    monkeypatch.setattr(LogicalSavePlanner, "create_local_plan", stale)
    tensors = {"x": torch.ones(8), "new": torch.ones(3)}
    with pytest.raises(CorruptCheckpointError, match="new: not written"):
        save_checkpoint(tmp_path, 2, tensors, meta={}, rank_state={}, group=None, keep_last=2)
    assert _steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*.tmp"))
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "step_00000001"


def test_an_index_that_ends_after_its_file_never_becomes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file system does that acknowledges writes and loses them."""

    def lose(phase: str) -> None:
        if phase == "data":
            monkeypatch.setattr("fp8train.checkpoint.save._digest_own_shards", digest_of_half)

    from fp8train.checkpoint import save as module

    original = module._digest_own_shards

    def digest_of_half(order: module.Order, rank: int) -> dict:
        for shard in order.tmp.glob("*.distcp"):
            shard.write_bytes(shard.read_bytes()[:-1])
        return original(order, rank)

    with pytest.raises(CorruptCheckpointError, match=r"x: ends after __0_0\.distcp"):
        save_checkpoint(
            tmp_path, 1, {"x": torch.ones(8)}, meta={}, rank_state={}, group=None, keep_last=1, on_phase=lose
        )
    assert list(tmp_path.iterdir()) == []
