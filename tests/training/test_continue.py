"""Resuming with other settings, and new runs that start from a checkpoint: what is said, refused and kept."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.rng import capture_rng
from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config, to_plain
from fp8train.step.trainer import Trainer
from fp8train.training.initialise import initialise_from
from fp8train.training.ready_run import ReadyRun
from fp8train.training.resume import resume
from tests.training.tiny import VOCAB, alone, batches, tiny_config

STEP = 3
O0, O2 = ["precision.level=O0"], ["precision.level=O2"]
FEEDBACK = [*O2, "precision.gradient.fp8.error_feedback=true"]


class Listener:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.events: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        """A line."""
        self.lines.append(text)

    def warn(self, text: str) -> None:
        """A warning."""
        self.warnings.append(text)

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        """An event."""
        self.events.append({"kind": kind, "step": step, **fields})


def start(overrides: list[str], processes: Any = None) -> tuple[Config, Trainer, Any]:
    """(configuration, trainer, batches) of a new run."""
    config, processes = tiny_config(overrides), processes or alone()
    return config, Trainer(config, processes, vocab_size=VOCAB), batches(config, processes)


def train(trainer: Trainer, data: Any, first: int, last: int) -> list[float]:
    """Losses of some steps."""
    return [float(trainer.step(step, data.batch(step)).loss) for step in range(first, last)]


def save(config: Config, trainer: Trainer, data: Any, root: Path, step: int = STEP) -> Path:
    """As the training loop does."""
    processes = trainer.processes
    return save_checkpoint(
        root,
        step,
        trainer.checkpoint_tensors(),
        meta={
            "config": to_plain(config),
            "vocab_size": VOCAB,
            "data": data.state_dict(step),
            "trainer": trainer.state_meta(),
        },
        rank_state=capture_rng(processes.device) | trainer.rank_tensors(),
        group=processes.control,
        keep_last=9,
    )


def ready(trainer: Trainer, data: Any, listener: Listener) -> ReadyRun:
    """Of a run without a directory."""
    return ReadyRun(cast(Any, None), data, trainer, cast(Any, listener))


def go_on(path: Path, overrides: list[str], processes: Any = None) -> tuple[Trainer, Any, Listener]:
    """Resume with these settings."""
    _, trainer, data = start(overrides, processes)
    listener = Listener()
    assert resume(ready(trainer, SimpleNamespace(train=data), listener), path) == STEP
    return trainer, data, listener


def begin(path: Path, overrides: list[str], tokenizer: Any = None) -> tuple[Trainer, Any, Listener]:
    """A new run from a checkpoint's weights."""
    _, trainer, data = start([*overrides, f"checkpoint.init_from={path}"])
    listener = Listener()
    initialise_from(ready(trainer, SimpleNamespace(tokenizer=tokenizer), listener), path)
    return trainer, data, listener


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    """As in the pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, list[float]]:
    """A checkpoint at O0, its trainer then, and the two losses after it."""
    config, trainer, data = start(O0)
    train(trainer, data, 0, STEP)
    path = save(config, trainer, data, tmp_path_factory.mktemp("run"))
    frozen = start(O0)[1]
    for name, tensor in frozen.state_tensors().items():
        tensor.copy_(trainer.state_tensors()[name])
    return path, frozen, train(trainer, data, STEP, STEP + 2)


def test_equal_settings_say_nothing(run) -> None:
    path, _, expected = run
    trainer, data, listener = go_on(path, O0)
    assert listener.lines == [f"resumed from {path} at step {STEP}"]
    assert train(trainer, data, STEP, STEP + 2) == expected


def test_another_level_is_refused_and_accepted(run) -> None:
    path, _, expected = run
    with pytest.raises(
        ConfigError, match=r"precision\.level: O0 -> O2.*\n.*\n.*accept_changes=\[precision\]"
    ):
        go_on(path, O2)
    trainer, data, listener = go_on(path, [*O2, "checkpoint.accept_changes=[precision]", "run.threads=1"])
    assert listener.lines[0].startswith("changed since the checkpoint: ")
    assert "precision.level: O0 -> O2" in listener.lines[0]
    assert "run.threads: null -> 1" in listener.lines[0]
    assert listener.lines[1].startswith(
        "recast master: fp32 -> fp16_scaled/blocks/stochastic (8 parameters: "
    ) or (listener.lines[1].startswith("recast master: fp32 -> fp16_scaled/blocks (8 parameters: "))
    event = listener.events[0]
    assert event["changes"]["precision.level"] == ["O0", "O2"]
    assert len(event["recast"]["exp_avg: fp32 -> e4m3/blocks"]) == 8
    losses = train(trainer, data, STEP, STEP + 2)
    assert losses == pytest.approx(expected, rel=0.01)
    assert losses != expected


def test_more_steps_are_accepted_by_name(run) -> None:
    path, _, _ = run
    with pytest.raises(ConfigError, match=r"train\.steps: 20 -> 40"):
        go_on(path, [*O0, "train.steps=40"])
    go_on(path, [*O0, "train.steps=40", "checkpoint.accept_changes=[train.steps]"])


def test_another_batch_size_goes_on_where_the_samples_ended(run) -> None:
    path, _, _ = run
    larger = [*O0, "train.global_batch_size=16", "checkpoint.accept_changes=[train.global_batch_size]"]
    _, data, _ = go_on(path, larger)
    assert data.samples_before(STEP) == STEP * 8
    assert data.samples_before(STEP + 1) == STEP * 8 + 16
    accepted = "checkpoint.accept_changes=[train]"
    with pytest.raises(ConfigError, match=r"train\.global_batch_size cannot change .* train\.tokens"):
        go_on(path, [*O0, "train.steps=null", "train.tokens=99999", "train.global_batch_size=16", accepted])


def test_another_optimizer_is_refused_by_name(run) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name: adamw -> lion"):
        go_on(run[0], [*O0, "optimizer.name=lion", "checkpoint.accept_changes=[optimizer]"])


def moved(group: Any, rank: int, world_size: int, path: Path, overrides: list[str], layout: Layout) -> Any:
    """Runs in the pool: resume, what was said, and the next losses."""
    trainer, data, listener = go_on(path, overrides, joined_processes(torch.device("cpu"), layout))
    return listener.lines, train(trainer, data, STEP, STEP + 2)


def test_another_layout_is_free(gloo_pool, run) -> None:
    path, _, expected = run
    cases = [(Layout(), ["train.micro_batch_size=2", "parallel.zero=1"]), (Layout(pp=2), ["parallel.pp=2"])]
    for layout, overrides in cases:
        for lines, losses in gloo_pool.run(moved, 2, path, [*O0, *overrides], layout, timeout=120.0):
            assert lines[0].startswith("changed since the checkpoint: ")
            assert overrides[-1].partition("=")[0] in lines[0]
            assert lines[1].startswith("another layout: random states start anew")
            assert losses == pytest.approx(expected, rel=2e-3)


def test_residuals_belong_to_a_layout(tmp_path: Path) -> None:
    config, trainer, data = start(FEEDBACK)
    train(trainer, data, 0, STEP)
    path = save(config, trainer, data, tmp_path)
    kept, _, listener = go_on(path, FEEDBACK)
    assert len(listener.lines) == 1
    residuals = trainer.rank_tensors()
    assert residuals
    assert any(bool(tensor.any()) for tensor in residuals.values())
    assert all(torch.equal(kept.rank_tensors()[name], tensor) for name, tensor in residuals.items())
    other = [*FEEDBACK, "precision.gradient.bucket_mib=0.003"]
    anew, _, listener = go_on(path, other)
    assert "residuals of error feedback start anew" in listener.lines
    assert not any(bool(tensor.any()) for tensor in anew.rank_tensors().values())
    _, _, listener = go_on(path, [*O2, "checkpoint.accept_changes=[precision]"])
    assert "residuals of error feedback are dropped: this run has none" in listener.lines


def save_in_pool(group: dist.ProcessGroup, rank: int, world_size: int, root: Path) -> Path:
    """Runs in the pool: a checkpoint with residuals of two ranks."""
    config, trainer, data = start(FEEDBACK, joined_processes(torch.device("cpu")))
    train(trainer, data, 0, STEP)
    assert trainer.rank_tensors()
    return save(config, trainer, data, root)


@pytest.mark.parametrize("overrides", [FEEDBACK, [*O2, "checkpoint.accept_changes=[precision]"]])
def test_residuals_that_fewer_ranks_cannot_take_are_told(
    gloo_pool, tmp_path: Path, overrides: list[str]
) -> None:
    path = gloo_pool.run(save_in_pool, 2, tmp_path)[0]
    _, _, listener = go_on(path, overrides)
    assert any("random states, residuals of error feedback start anew" in line for line in listener.lines)


STAGE_WITHOUT_FP8 = [*FEEDBACK, "parallel.pp=2", "precision.gemm.exclude=[layers.0.*]"]


def continue_in_stages(
    group: dist.ProcessGroup, rank: int, world_size: int, root: Path
) -> tuple[int, bool, list[str]]:
    """Runs in the pool: residuals of this stage, whether they came back, and what was said."""
    processes = joined_processes(torch.device("cpu"), Layout(pp=2))
    config, trainer, data = start(STAGE_WITHOUT_FP8, processes)
    train(trainer, data, 0, STEP)
    path = save(config, trainer, data, root)
    kept, _, listener = go_on(path, STAGE_WITHOUT_FP8, processes)
    ours, theirs = trainer.rank_tensors(), kept.rank_tensors()
    return len(ours), all(torch.equal(ours[name], theirs[name]) for name in ours), listener.lines


def test_a_stage_without_residuals_speaks_for_itself(gloo_pool, tmp_path: Path) -> None:
    first, last = gloo_pool.run(continue_in_stages, 2, tmp_path)
    assert first[0] == 0 < last[0] and last[1]
    for _, _, lines in (first, last):
        assert not any("error feedback" in line for line in lines), lines


def test_weights_alone_start_a_new_run(run) -> None:
    path, frozen, _ = run
    for overrides in (O0, O2, [*O2, "optimizer.name=lion", "optimizer.lr=0.001", "data.seq_length=8"]):
        trainer, data, listener = begin(path, overrides)
        for fqn in frozen.optimizer.states:
            # FP16 with a scale per block keeps 11 bits.
            assert torch.allclose(
                trainer.optimizer.states.master(fqn),
                frozen.optimizer.states.master(fqn),
                rtol=2**-11,
                atol=1e-6,
            )
            assert not trainer.optimizer.states.decoded(fqn, "exp_avg").any()
        assert trainer.updates == 0
        assert listener.lines[-1] == f"weights taken from {path} (step {STEP}); training starts at step 0"
        assert listener.events[-1]["kind"] == "initialised"
        assert train(trainer, data, 0, 1)[0] < 4.1 < 4.16  # ln 64 is 4.16


def test_weights_that_know_other_tokens_are_told(run, tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / run[0].name
    shutil.copytree(run[0], path)
    beside = path.parent.parent / "tokenizer.model"
    beside.write_bytes(b"tokens")
    same = SimpleNamespace(path=tmp_path / "same.model", sha256=hashlib.sha256(b"tokens").hexdigest())
    other = SimpleNamespace(path=tmp_path / "other.model", sha256="0" * 64)
    assert begin(path, O0, same)[2].warnings == [] == begin(path, O0)[2].warnings
    (warning,) = begin(path, O0, other)[2].warnings
    assert f"trained with the tokenizer {beside}" in warning and f"another, {other.path}" in warning


def test_a_warm_start_takes_moments_and_updates(run) -> None:
    path, frozen, _ = run
    trainer, data, listener = begin(path, [*O0, "checkpoint.init_mode=warm", "schedule.kind=constant"])
    for name, tensor in frozen.state_tensors().items():
        assert torch.equal(trainer.state_tensors()[name], tensor), name
    assert trainer.updates == STEP
    assert listener.lines[-1].startswith("weights and moments taken from")
    train(trainer, data, 0, 1)
    with pytest.raises(ConfigError, match=r"lion, but the checkpoint was .* adamw.*init_mode=model"):
        begin(path, [*O0, "checkpoint.init_mode=warm", "optimizer.name=lion"])


def test_a_checkpoint_of_weights_alone(run, tmp_path: Path) -> None:
    """What an import writes: masters in FP32, the model's configuration, no state of training."""
    _, frozen, _ = run
    weights = {name: t for name, t in frozen.state_tensors().items() if name.startswith("master/")}
    meta = {"config": to_plain(frozen.config), "vocab_size": VOCAB, "tokenizer": None}
    path = save_checkpoint(tmp_path, 0, weights, meta=meta, rank_state={}, group=None, keep_last=1)
    trainer, _, _ = begin(path, ["precision.level=O3"])
    embedding = frozen.optimizer.states.master("embedding.weight")
    assert torch.equal(trainer.optimizer.states.master("embedding.weight"), embedding)
    with pytest.raises(CheckpointError, match="holds no optimizer states"):
        begin(path, [*O0, "checkpoint.init_mode=warm"])
    with pytest.raises(CheckpointError, match=r"no state of a training run.*\n?.*checkpoint\.init_from"):
        go_on(path, O0)


def test_another_model_is_refused(run) -> None:
    with pytest.raises(ConfigError, match=r"model\.qk_norm: none -> frozen"):
        begin(run[0], [*O0, "model.qk_norm=frozen"])
    with pytest.raises(ConfigError, match=r"parametrization\.kind: standard -> mus"):
        begin(run[0], [*O0, "parametrization.kind=mus", "optimizer.weight_decay=0.0001"])
    with pytest.raises(CheckpointError, match=r"embedding\.weight: checkpoint has \(128, 32\), run has"):
        begin(run[0], [*O0, "model.vocab_multiple=192"])


@pytest.mark.parametrize("recipe", ["umup", "unit_scaling", "mus"])
def test_another_length_of_sequences_keeps_attention_s_factor(tmp_path: Path, recipe: str) -> None:
    """It is part of a unit-scaled model, and depends on nothing that the weights' shapes show."""
    unit = [f"precision.recipe={recipe}"]
    config, trainer, data = start([*unit, "data.seq_length=16"])
    path = save(config, trainer, data, tmp_path)
    longer = [*unit, "data.seq_length=32"]
    if recipe == "mus":  # has no such factor
        begin(path, longer)
        return
    with pytest.raises(ConfigError, match=r"for sequences of 16 tokens.* 32; write .*attention_length: 16"):
        begin(path, longer)
    kept, _, _ = begin(path, [*longer, "parametrization.attention_length=16"])
    factors = trainer.model.parametrization.attention()
    assert kept.model.parametrization.attention() == factors
    assert start(longer)[1].model.parametrization.attention() != factors
    tokens = data.batch(0)[0, :, :-1]
    assert torch.equal(kept.model.logits(tokens), trainer.model.logits(tokens))
    # and once more, from the run that was told
    again = save(kept.config, kept, batches(kept.config, alone()), tmp_path / "told")
    begin(again, [*unit, "data.seq_length=8", "parametrization.attention_length=16"])
