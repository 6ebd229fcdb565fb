"""States in host memory: the bits of a run that keeps them on the device, and what copies wait for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8train.checkpoint.load import open_checkpoint
from fp8train.checkpoint.save import save_checkpoint
from fp8train.kernels.optimizer_update import optimizer_update
from fp8train.optim.copy_queues import CopiesAtOnce, Queue
from fp8train.optim.host_states import Offload
from fp8train.optim.offload_plan import SLOTS
from fp8train.step.trainer import Trainer
from fp8train.training.restore import ROLES, restore
from tests.checkpoint.loading import load_checkpoint
from tests.optim.late_queues import LateQueues, Race
from tests.step.graph_recorder import GraphRecorder, launched
from tests.step.test_gradient_release import ONE_MICRO_BATCH, SMALL, bits, train
from tests.training.tiny import VOCAB, alone, batches, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

SLOT = 8192
"""Bytes of a slot: each matrix of a block is a load, or shares one; embedding and head come in pieces."""
O1, O2, O3 = (f"precision.level=O{level}" for level in (1, 2, 3))
CASES: dict[str, list[str]] = {
    "O0": ["precision.level=O0"],
    "O0, masters in parameters": ["precision.level=O0", "precision.compute=fp32"],
    "O0, fp64": ["precision.level=O0", "precision.compute=fp64"],
    "O1": [O1],
    "O1, remainder": [O1, "precision.weights=compute", "precision.state.master.format=bf16_remainder"],
    "O1, fp32 states": [O1, "precision.state.master.format=fp32", "precision.weights=compute"],
    "O2, lean": [O2, "precision.state.plan=lean"],
    "O2, coat, tied": [O2, "precision.state.plan=coat", "model.tie_embeddings=true"],
    "O2, e4m3_e5m2": [O2, "precision.state.plan=e4m3_e5m2"],
    "O2, paper": [O2, "precision.profile=paper"],
    "O3": [O3],
    "O3, lion, gpt": [
        O3,
        "optimizer.name=lion",
        "optimizer.lr=0.002",
        "model.family=gpt",
        "model.num_kv_heads=4",
    ],
    "O3, weights in BF16": [O3, "precision.weights=compute", "precision.traffic.weights=compute"],
}


def trainer_of(
    overrides: list[str], queues: LateQueues | None, *, slot_bytes: int = SLOT, **options: Any
) -> Trainer:
    """With states in host memory if there are queues."""
    offload = None if queues is None else Offload(queues, slot_bytes)
    place = "none" if queues is None else "cpu"
    config = tiny_config([*overrides, f"optimizer.offload={place}"])
    return Trainer(config, alone(), vocab_size=VOCAB, offload=offload, **options)


def both(overrides: list[str], **options: Any) -> tuple[Trainer, Trainer]:
    return trainer_of(overrides, None, **options), trainer_of(overrides, LateQueues(), **options)


def save(trainer: Trainer, root: Path) -> Path:
    tensors, meta = trainer.checkpoint_tensors(), trainer.state_meta()
    return save_checkpoint(root, 2, tensors, meta=meta, rank_state={}, group=None, keep_last=1)


def resume(trainer: Trainer, path: Path) -> Trainer:
    trainer.restored(load_checkpoint(path, trainer.state_tensors(), group=None).meta)
    return trainer


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_bits_of_one_on_the_device(name: str, tmp_path: Path) -> None:
    """Losses, norms, states and weights; and after checkpoints in both directions."""
    plain, offloaded = both(CASES[name])
    states = offloaded.optimizer.states
    assert len(states.at_work) > len(states), "no parameter comes in pieces: the case shows nothing"
    assert bits(offloaded) == bits(plain)
    assert train(offloaded, 0, 2) == train(plain, 0, 2)
    assert bits(offloaded) == bits(plain)
    saved = save(plain, tmp_path / "plain"), save(offloaded, tmp_path / "offloaded")
    onto_host = resume(trainer_of(CASES[name], LateQueues()), saved[0])
    onto_device = resume(trainer_of(CASES[name], None), saved[1])
    expected = train(plain, 2, 3)
    for trainer in (offloaded, onto_host, onto_device):
        assert train(trainer, 2, 3) == expected
        assert bits(trainer) == bits(plain)


@pytest.mark.parametrize(
    ("overrides", "recast"),
    [([O2], [O2, "precision.state.plan=coat"]), ([O1], [O2, "precision.state.plan=e4m3_e5m2"])],
    ids=["coat", "e4m3_e5m2"],
)
def test_states_are_recast_to_the_same_bits(overrides: list[str], recast: list[str], tmp_path: Path) -> None:
    before = trainer_of(overrides, None)
    train(before, 0, 2)
    path = save(before, tmp_path)
    found = []
    for trainer in both(recast):
        opened = open_checkpoint(path, group=None)
        done = restore(trainer, opened, roles=ROLES, scales=True, reshard="refuse")
        trainer.restored(opened.meta)
        found.append((done, bits(trainer), train(trainer, 2, 3), bits(trainer)))
    assert found[0] == found[1] and found[0][0].recasts


@pytest.mark.parametrize("name", ["O1", "O2, lean", "O2, paper", "O3, weights in BF16"])
def test_branches_of_a_gpu_have_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused pass, whose tables of addresses are written once, and targets that take a stored master; with
    the references of fused operations."""
    monkeypatch.setattr("fp8train.optim.optimizer.default_update", lambda device: optimizer_update)
    with launched(fuse=True):
        plain, offloaded = both(CASES[name])
        assert train(offloaded, 0, 3) == train(plain, 0, 3)
    assert bits(offloaded) == bits(plain)
    told = [trainer.optimizer.describe_pass().split(" in ")[0] for trainer in (plain, offloaded)]
    assert told[0] == told[1] and len(offloaded.optimizer.weight_amax()) > len(plain.optimizer.weight_amax())


@pytest.mark.parametrize("fuse", [False, True])
def test_recorded_steps_have_the_same_bits(fuse: bool) -> None:
    with launched(fuse=fuse):
        plain, offloaded = (
            trainer_of([O3, f"run.cuda_graphs={str(graphs).lower()}"], queues, recorder=recorder)
            for graphs, queues, recorder in ((False, None, None), (True, LateQueues(), GraphRecorder()))
        )
        assert train(offloaded, 0, 5) == train(plain, 0, 5)
    assert bits(offloaded) == bits(plain)
    assert offloaded.recorded is not None and offloaded.recorded.replays >= 2


@pytest.mark.parametrize("name", ["O0", "O2, paper", "O3"])
def test_gradients_may_be_released_as_well(name: str) -> None:
    released = [*ONE_MICRO_BATCH, "train.gradient_release=true", SMALL, *CASES[name]]
    plain, offloaded = both(released)
    assert train(offloaded, 0, 3) == train(plain, 0, 3)
    assert bits(offloaded) == bits(plain)
    assert len(offloaded.store.lasting) < len(offloaded.store.buckets)


def test_states_of_the_next_bucket_are_on_their_way() -> None:
    """From the second step on, when the order of buckets is known; after a checkpoint anew."""
    released = [*ONE_MICRO_BATCH, "train.gradient_release=true", SMALL, *CASES["O3"]]
    trainer = trainer_of(released, LateQueues())
    host, update, found = trainer.optimizer.states._host, trainer.optimizer.update, []
    assert host is not None

    def looking(grad: Any, fqns: Any) -> None:
        first = next(load for load in host._loads if not set(fqns).isdisjoint(load.fqns))
        fetched = host._fetched[first.slot]
        found.append(fetched is not None and host._loads[fetched.load] is first)
        update(grad, fqns)

    trainer.optimizer.update = looking  # type: ignore[method-assign]
    for step in range(3):
        found.clear()
        train(trainer, step, step + 1)
        assert all(found[1:]) if step else not any(found), found
        assert len(found) == len(trainer.store.buckets)
        trainer.state_tensors()


def test_loaded_states_are_not_those_that_were_fetched_ahead() -> None:
    plain, offloaded = both(CASES["O3"])
    for trainer in (plain, offloaded):
        train(trainer, 0, 2)  # from then on slots are filled for the next step
        for name, tensor in trainer.optimizer.states.tensors().items():
            if name.startswith("exp_avg/"):
                tensor.zero_()
    assert train(offloaded, 2, 3) == train(plain, 2, 3) and bits(offloaded) == bits(plain)


def test_sampled_statistics_are_the_same() -> None:
    found = []
    for trainer in both([O2, "logging.cast_statistics_interval=1", "precision.guard.action=report"]):
        assert trainer.monitors.recorder is not None
        trainer.monitors.recorder.active = True
        train(trainer, 0, 2)
        shares = trainer.monitors.optimizer_metrics(trainer.optimizer)
        found.append((str(trainer.monitors.cast_rows()), str(shares), trainer.monitors.guard_metrics()))
        assert shares
    assert found[0] == found[1]


def test_a_skipped_step_changes_nothing() -> None:
    trainer = trainer_of([O2], LateQueues())
    train(trainer, 0, 1)
    before, forward = bits(trainer), trainer.model.forward
    copied = dict(trainer.optimizer.states._host._queues.copied)  # type: ignore[union-attr]
    trainer.model.forward = lambda *args: forward(*args) * math.inf  # type: ignore[method-assign]
    assert not trainer.step(1, batches(trainer.config, alone()).batch(1)).applied
    trainer.model.forward = forward  # type: ignore[method-assign]
    assert bits(trainer) == before
    assert trainer.optimizer.states._host._queues.copied == copied  # type: ignore[union-attr]


WAITS: tuple[tuple[Queue, Queue], ...] = (
    ("compute", "in"),
    ("out", "compute"),
    ("in", "out"),
    ("in", "compute"),
)


@pytest.mark.parametrize("forget", WAITS, ids="-".join)
def test_each_wait_is_needed(forget: tuple[Queue, Queue]) -> None:
    """Without it two uses of memory are in no order."""
    with pytest.raises(Race):
        train(trainer_of([O2], LateQueues(forget=forget)), 0, 1)
    train(trainer_of([O2], LateQueues()), 0, 1)


@pytest.mark.parametrize("forget", WAITS[::2], ids="-".join)
def test_a_slot_that_is_used_too_early_gives_other_bits(forget: tuple[Queue, Queue]) -> None:
    """A step that computes before its states are there, or overwrites a slot that is not on the host yet."""
    plain, early = trainer_of([O2], None), trainer_of([O2], LateQueues(forget=forget, check=False))
    train(plain, 0, 2)
    train(early, 0, 2)
    assert bits(early) != bits(plain)


def copied_by(load: Any) -> int:
    return sum(copy.host.nbytes for copy in load.copies)


def test_a_step_copies_each_state_once_in_each_direction() -> None:
    """The device has slots alone, three of the largest load; masters in BF16 parameters do not travel."""
    for name in ("O2, lean", "O1, remainder", "O0, masters in parameters"):
        queues = LateQueues(check=False)
        trainer = trainer_of(CASES[name], queues)
        states, fqns = trainer.optimizer.states, list(trainer.outline.specs)
        host = states._host
        assert host is not None
        stored = sum(states.stored_bytes(in_plan_only=False).values()) - states.bytes_in_parameters(fqns)
        train(trainer, 0, 1)
        states.tensors()
        before = dict(queues.copied)
        train(trainer, 1, 2)
        states.tensors()
        moved = {queue: queues.copied[queue] - before[queue] for queue in before}
        assert moved["out"] == stored and moved["compute"] == 0
        # Which of the next step's loads are there already.
        assert moved["in"] - stored == min(stored, sum(copied_by(host._loads[slot]) for slot in range(SLOTS)))
        # Rounded up to multiples of 256 bytes; a matrix of 4096 elements may not be cut.
        assert stored <= queues.host_bytes < stored + 256 * 8 * len(states)
        assert queues.device_bytes == states.slot_bytes <= SLOTS * (4 * 4096 + 2048)


def test_a_cpu_copies_at_once_unless_told() -> None:
    trainer = trainer_of([O2], None)
    assert not trainer.optimizer.states.in_host_memory and trainer.optimizer.states.slot_bytes == 0
    config = tiny_config([O2, "optimizer.offload=cpu"])
    offloaded = Trainer(config, alone(), vocab_size=VOCAB)
    host = offloaded.optimizer.states._host
    assert host is not None and isinstance(host._queues, CopiesAtOnce)
    assert train(offloaded, 0, 2) == train(trainer, 0, 2) and bits(offloaded) == bits(trainer)


def test_checkpoints_read_host_memory_in_place() -> None:
    trainer = trainer_of([O2], LateQueues())
    train(trainer, 0, 1)
    one, other = trainer.state_tensors(), trainer.checkpoint_tensors()
    for name, tensor in trainer.optimizer.states.tensors().items():
        found = other[name] if isinstance(other[name], torch.Tensor) else other[name].local  # type: ignore[union-attr]
        assert one[name].data_ptr() == tensor.data_ptr() == found.data_ptr(), name
