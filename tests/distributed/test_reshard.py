"""A checkpoint of any layout in any other: the same states to the bit, and training that goes on as if
nothing had happened.

The whole matrix takes minutes: ``python -m pytest -m slow tests/distributed/test_reshard.py``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.load import open_checkpoint
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.processes import Layout, Processes, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config, to_plain
from fp8train.inference.export_states import export_states
from fp8train.inference.load import open_run
from fp8train.step.trainer import Trainer
from fp8train.training.restore import restore
from tests.distributed.pool import GlooPool
from tests.training.tiny import VOCAB, alone, batches, tiny_config

# Rows of 256 have blocks of 128, which a cut in two leaves whole.
SIZES: dict[str, Any] = {
    "model": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 32,
        "ffn_hidden_size": 256,
        "vocab_size": VOCAB,
    }
}
NONE, ROWS = ["parallel.zero=none"], ["parallel.zero=1"]
WHOLE = [*ROWS, "parallel.zero_partition=whole_tensor"]
LAYOUTS: dict[str, tuple[int, Layout, list[str]]] = {
    "1": (1, Layout(), NONE),
    "dp2": (2, Layout(), NONE),
    "dp2-rows": (2, Layout(), ROWS),
    "dp2-whole": (2, Layout(), WHOLE),
    "tp2": (2, Layout(tp=2), NONE),
    "pp2": (2, Layout(pp=2), NONE),
    "cp2": (2, Layout(cp=2), NONE),
    "cp2-rows": (2, Layout(cp=2), ROWS),
    "dp4-rows": (4, Layout(), ROWS),
    "dp4-whole": (4, Layout(), WHOLE),
    "tp2-dp2-rows": (4, Layout(tp=2), ROWS),
    "pp2-dp2-whole": (4, Layout(pp=2), WHOLE),
    "tp2-pp2": (4, Layout(tp=2, pp=2), NONE),
    "cp2-dp2-rows": (4, Layout(cp=2), ROWS),
    "tp2-cp2-whole": (4, Layout(tp=2, cp=2), WHOLE),
}
# Of the loss, against the run that went on in its own layout (tests/distributed/test_tensor_parallel.py).
BOUND = {"O0": 2e-3, "O3": 5e-3}
STEP = 2


def make_config(layout: str, level: str, more: list[str]) -> Config:
    """Of one of :data:`LAYOUTS`."""
    _, axes, zero = LAYOUTS[layout]
    cuts = [f"parallel.{axis}={getattr(axes, axis)}" for axis in ("tp", "pp", "cp")]
    return tiny_config([f"precision.level={level}", *cuts, *zero, *more], **SIZES)


def make(layout: str, level: str, more: list[str]) -> tuple[Trainer, Processes]:
    """A trainer in one of :data:`LAYOUTS`; in the pool."""
    world, axes, _ = LAYOUTS[layout]
    processes = alone() if world == 1 else joined_processes(torch.device("cpu"), axes)
    return Trainer(make_config(layout, level, more), processes, vocab_size=VOCAB), processes


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def canonical(trainer: Trainer, processes: Processes) -> str:
    """SHA-256 of all logical tensors, put together from all ranks: the same for any layout."""
    mine = []
    for name, value in trainer.checkpoint_tensors().items():
        part = (
            value
            if isinstance(value, LogicalTensor)
            else LogicalTensor(value, tuple(value.shape), (0,) * value.dim())
        )
        bits = part.local.contiguous().view(INTEGERS[part.local.element_size()]).numpy()
        mine.append((name, part.global_shape, part.offset, bits))
    whole: dict[str, torch.Tensor] = {}
    covered: dict[str, torch.Tensor] = {}
    for name, shape, offset, bits in (
        one for rank in Ranks(processes.control).each(lambda: mine) for one in rank
    ):
        local = torch.from_numpy(bits)
        for known, values in ((whole, local), (covered, torch.ones(local.shape, dtype=torch.bool))):
            target = known.setdefault(name, torch.zeros(shape, dtype=values.dtype))
            for dim, (start, size) in enumerate(zip(offset, values.shape, strict=True)):
                target = target.narrow(dim, start, size)
            target.copy_(values)
    assert all(bool(mask.all()) for mask in covered.values())
    sha = hashlib.sha256()
    for name in sorted(whole):
        sha.update(f"{name} {tuple(whole[name].shape)}".encode())
        sha.update(whole[name].numpy().tobytes())
    return sha.hexdigest()


def next_losses(trainer: Trainer, processes: Processes) -> list[float]:
    """Of the two steps after the checkpoint: the second one depends on all optimizer states."""
    data = batches(trainer.config, processes)
    return [float(trainer.step(step, data.batch(step)).loss) for step in (STEP, STEP + 1)]


def save(
    group: dist.ProcessGroup, rank: int, world_size: int, layout: str, level: str, root: Path, more: list[str]
) -> tuple[str, list[float]]:
    """Runs in the pool: a checkpoint, the hash of its states, and how its own run goes on."""
    trainer, processes = make(layout, level, more)
    data = batches(trainer.config, processes)
    for step in range(STEP):
        trainer.step(step, data.batch(step))
    save_checkpoint(
        root / level / layout,
        STEP,
        trainer.checkpoint_tensors(),
        meta={"config": to_plain(trainer.config), "trainer": trainer.state_meta()},
        rank_state={},
        group=processes.control,
        keep_last=1,
    )
    return canonical(trainer, processes), next_losses(trainer, processes)


def load(
    group: dist.ProcessGroup,
    rank: int,
    world_size: int,
    layout: str,
    level: str,
    root: Path,
    sources: list[str],
    more: list[str],
) -> dict[str, tuple[str, list[float], list[str]]]:
    """Runs in the pool: hash, losses and recasts after loading each of ``sources``."""
    trainer, processes = make(layout, level, more)
    found = {}
    for source in sources:
        opened = open_checkpoint(root / level / source / f"step_{STEP:08d}", group=processes.control)
        done = restore(
            trainer,
            opened,
            roles=trainer.optimizer.states.roles,
            scales=True,
            reshard=trainer.config.checkpoint.reshard,
        )
        trainer.restored(opened.meta["trainer"])
        found[source] = canonical(trainer, processes), next_losses(trainer, processes), list(done.recasts)
    return found


def check(pool: GlooPool, root: Path, level: str, sources: list[str], targets: list[str]) -> None:
    """Save in every source, load in every target."""
    saved = {}
    for source in sources:
        ranks = pool.run(save, LAYOUTS[source][0], source, level, root, [], timeout=300.0)
        assert all(one == ranks[0] for one in ranks), source
        saved[source] = ranks[0]
    for target in targets:
        for result in pool.run(load, LAYOUTS[target][0], target, level, root, sources, [], timeout=900.0):
            for source, (digest, losses, recasts) in result.items():
                assert digest == saved[source][0], f"{level}: {source} -> {target}: states differ"
                assert not recasts
                bound = 0.0 if source == target else BOUND[level]
                assert losses == pytest.approx(saved[source][1], rel=bound), f"{level}: {source} -> {target}"


def test_a_sample_of_layouts(gloo_pool, tmp_path: Path) -> None:
    check(gloo_pool, tmp_path, "O3", ["tp2", "dp2-whole", "1"], ["pp2", "dp2-rows", "1"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("level", BOUND)
def test_the_matrix_of_layouts(gloo_pool, tmp_path: Path, level: str) -> None:
    check(gloo_pool, tmp_path, level, list(LAYOUTS), list(LAYOUTS))


# Rows of 8 * 16 are one block, which a cut in two splits; gradients have smaller ones.
CUT = {"O0": ["model.head_dim=16"], "O3": ["model.head_dim=16", "precision.gradient.fp8.block=64"]}
REQUANTISE = "checkpoint.reshard=requantise"


def decoded(trainer: Trainer, processes: Processes) -> dict[str, torch.Tensor]:
    """All states as whole FP32 tensors."""
    mine = [
        (
            f"{role}/{fqn}",
            state.spec.global_shape,
            state.region.offset,
            trainer.optimizer.states.decoded(fqn, role).numpy(),
        )
        for fqn, state in trainer.optimizer.states.items()
        for role in trainer.optimizer.states.roles
    ]
    found: dict[str, torch.Tensor] = {}
    for name, shape, offset, part in (
        one for rank in Ranks(processes.control).each(lambda: mine) for one in rank
    ):
        target = found.setdefault(name, torch.zeros(shape))
        for dim, (start, size) in enumerate(zip(offset, part.shape, strict=True)):
            target = target.narrow(dim, start, size)
        target.copy_(torch.from_numpy(part))
    return found


def move(
    group: dist.ProcessGroup,
    rank: int,
    world_size: int,
    root: Path,
    source: tuple[str, str] | None,
    target: tuple[str, str],
    more: list[str],
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Runs in the pool: states of a checkpoint in another layout and level, and what was recast; saved again.
    Without ``source``: those of a run of two steps."""
    level, layout = target
    trainer, processes = make(layout, level, [*CUT[level], *more])
    recasts: list[str] = []
    if source is None:
        data = batches(trainer.config, processes)
        for step in range(STEP):
            trainer.step(step, data.batch(step))
    else:
        opened = open_checkpoint(root / "-".join(source) / f"step_{STEP:08d}", group=processes.control)
        reshard = trainer.config.checkpoint.reshard
        states = trainer.optimizer.states
        recasts = list(restore(trainer, opened, roles=states.roles, scales=True, reshard=reshard).recasts)
    save_checkpoint(
        root / "-".join(target),
        STEP,
        trainer.checkpoint_tensors(),
        meta={"config": to_plain(trainer.config), "vocab_size": VOCAB},
        rank_state={},
        group=processes.control,
        keep_last=1,
    )
    return decoded(trainer, processes), recasts


def test_a_cut_through_blocks_is_refused_or_recast(gloo_pool, tmp_path: Path) -> None:
    whole, _ = move(None, 0, 1, tmp_path, None, ("O3", "1"), [])  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"parallel.tp \(2\) cuts rows .* = 128 inside a scale block of 128"
    ):
        make_config("tp2", "O3", CUT["O3"])

    # O0 has no blocks: the stored ones are read whole, and nothing is rounded.
    cut, recasts = gloo_pool.run(move, 2, tmp_path, ("O3", "1"), ("O0", "tp2"), [], timeout=120.0)[0]
    assert any(change.startswith("exp_avg: e4m3/blocks -> fp32") for change in recasts)
    assert all(torch.equal(cut[name], values) for name, values in whole.items())

    # Smaller blocks hold what larger ones do.
    cut, recasts = gloo_pool.run(move, 2, tmp_path, ("O3", "1"), ("O3", "tp2"), [REQUANTISE], timeout=120.0)[
        0
    ]
    assert {change.partition(":")[0] for change in recasts} == {"master", "exp_avg", "exp_avg_sq"}
    assert "exp_avg: e4m3/block128 -> e4m3/block64" in recasts
    assert all(torch.equal(cut[name], values) for name, values in whole.items())

    # Whoever reads a checkpoint in one process finds the smaller blocks too.
    path = tmp_path / "O3-tp2" / f"step_{STEP:08d}"
    export_states(path, tmp_path / "states.safetensors", max_shard_bytes=10**9)
    exported = load_file(tmp_path / "states.safetensors")
    assert len(exported) == len(whole)
    for name, values in whole.items():
        assert torch.equal(exported[name.removeprefix("master/")], values), name
    model = open_run(path).load("bf16", device=torch.device("cpu")).model
    for fqn, parameter in model.named_parameters():
        assert torch.equal(parameter.float(), whole[f"master/{fqn}"].bfloat16().float()), fqn

    # Back to larger ones they are rounded once more: refused unless asked for.
    with pytest.raises(CheckpointError) as refused:
        move(None, 0, 1, tmp_path, ("O3", "tp2"), ("O3", "1"), [])  # type: ignore[arg-type]
    for part in ("attention.out.weight", "blocks of 64 elements", "has blocks of 128", "reshard=requantise"):
        assert part in str(refused.value)
    back, recasts = move(None, 0, 1, tmp_path, ("O3", "tp2"), ("O3", "1"), [REQUANTISE])  # type: ignore[arg-type]
    assert "exp_avg: e4m3/block64 -> e4m3/block128" in recasts
    for name, values in whole.items():
        assert torch.equal(back[name], values), name  # these values had been in blocks of 128 before


# One scale per tensor: ranks that hold parts must agree on it.
PAPER = ["precision.profile=paper", "precision.gradient.fp8.reduce=exchange"]
LEVELS: dict[str, tuple[str, list[str]]] = {
    **{level: (level, []) for level in ("O0", "O1", "O2", "O3")},
    "paper": ("O2", PAPER),
}


def change_levels(
    group: dist.ProcessGroup | None,
    rank: int,
    world_size: int,
    layout: str,
    root: Path,
    pairs: list[tuple[str, str]],
) -> dict[tuple[str, str], tuple[dict[str, torch.Tensor], list[float]]]:
    """Runs in the pool: states and next losses of each pair of levels, from checkpoints of one process."""
    found = {}
    for source, target in pairs:
        level, more = LEVELS[target]
        trainer, processes = make(layout, level, more)
        opened = open_checkpoint(root / source / f"step_{STEP:08d}", group=processes.control)
        restore(trainer, opened, roles=trainer.optimizer.states.roles, scales=True, reshard="refuse")
        trainer.restored({"updates": STEP})
        found[source, target] = decoded(trainer, processes), next_losses(trainer, processes)
    return found


SAMPLE = [("O0", "paper"), ("paper", "O3"), ("O2", "O0")]
ALL = [(source, target) for source in LEVELS for target in LEVELS]


@pytest.mark.parametrize(
    ("layout", "pairs"),
    [
        ("tp2", SAMPLE),
        pytest.param("dp2-rows", ALL, marks=pytest.mark.slow),
        pytest.param("tp2-dp2-rows", ALL, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_levels_change_in_parts_as_in_one_process(
    gloo_pool, tmp_path: Path, layout: str, pairs: list[tuple[str, str]]
) -> None:
    """What one process makes of a level is held against definitions in tests/training/test_restore.py."""
    for source in dict.fromkeys(source for source, _ in pairs):
        level, more = LEVELS[source]
        trainer, processes = make("1", level, more)
        data = batches(trainer.config, processes)
        for step in range(STEP):
            trainer.step(step, data.batch(step))
        meta = {"config": to_plain(trainer.config), "trainer": trainer.state_meta()}
        tensors = trainer.checkpoint_tensors()
        save_checkpoint(tmp_path / source, STEP, tensors, meta=meta, rank_state={}, group=None, keep_last=1)
    whole = change_levels(None, 0, 1, "1", tmp_path, pairs)
    for result in gloo_pool.run(change_levels, LAYOUTS[layout][0], layout, tmp_path, pairs, timeout=800.0):
        for pair, (states, losses) in whole.items():
            for name, values in states.items():
                assert torch.equal(result[pair][0][name], values), (pair, name)
            assert result[pair][1] == pytest.approx(losses, rel=BOUND["O3"]), pair
