"""File systems that show late what another machine wrote: an injected view stands for NFS."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fp8train.checkpoint.catalog import find_checkpoint
from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.readback import describe
from fp8train.checkpoint.retention import Retention
from fp8train.checkpoint.save import Order, with_rank_state, write_checkpoint
from fp8train.checkpoint.visibility import View, await_all, read_now, size_now


class Late:
    """A view that shows a name only at the ``looks``-th look at it."""

    def __init__(self, looks: int, never: str = "nothing") -> None:
        self.looks, self.never, self.seen = looks, never, Counter[str]()

    def size(self, path: Path) -> int | None:
        """As `size_now`, late."""
        return size_now(path) if self._shows(path) else None

    def read(self, path: Path) -> bytes | None:
        """As `read_now`, late."""
        return read_now(path) if self._shows(path) else None

    def _shows(self, path: Path) -> bool:
        self.seen[path.name] += 1
        return self.seen[path.name] >= self.looks and self.never not in path.name


def _order(root: Path, view: View) -> tuple[Order, Any]:
    held = with_rank_state({"x": torch.arange(8.0)}, {}, 0)
    return Order(root, 3, {}, describe(held), Retention(2), view=view), held


class SecondRank:
    """Rank 1 of two; rank 0 saw what is on the disk."""

    rank = 1

    def first(self, step: Any) -> Any:
        """What rank 0 found."""
        del step
        return self.found

    def agree(self, step: Any) -> Any:
        """This rank's part."""
        return step()

    def __init__(self, found: Any) -> None:
        self.found = found


def test_a_save_waits_for_what_shows_up_late(tmp_path: Path) -> None:
    late = Late(3)
    order, held = _order(tmp_path, View(30.0, late.size, late.read))
    write_checkpoint(order, held, Ranks(None))
    assert late.seen["step_00000003.tmp"] == late.seen["__0_0.distcp"] == 3
    assert find_checkpoint(tmp_path, "auto") == order.final


def test_a_shard_that_never_shows_up_is_an_error_that_names_it(tmp_path: Path) -> None:
    late = Late(1, never="__0_0")
    order, held = _order(tmp_path, View(0.05, late.size, late.read))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: rank 0 does not see it, 0\.05 s") as caught:
        write_checkpoint(order, held, Ranks(None))
    assert "`visibility_timeout_s`" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_rank_waits_until_it_sees_what_rank_0_does(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b"new")
    ranks = cast(Ranks, SecondRank(hashlib.sha256(b"new").hexdigest()))
    late = Late(4)
    await_all(path, ranks, View(30.0, late.size, late.read))
    assert late.seen["manifest.json"] == 4
    path.write_bytes(b"old")  # what a client remembers
    with pytest.raises(CheckpointError, match=r"manifest\.json: rank 1 sees an old state of it"):
        await_all(path, ranks, View(0.05))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: rank 1 does not see it"):
        await_all(path, ranks, View(0.05))


def test_no_clock_of_another_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a year off, on the machine that saves or on the one that continues."""
    order, held = _order(tmp_path, View(5.0))
    monkeypatch.setattr(time, "time", lambda: 1.0)
    write_checkpoint(order, held, Ranks(None))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert find_checkpoint(tmp_path, "auto") == order.final
