"""Gradients released during backward: the same bits as without, few bytes, and what a broken step leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.checkpoint.save import save_checkpoint
from fp8train.models.build import build_model, initialise
from fp8train.parallel.gradients.bucket_plan import part_of
from fp8train.parallel.gradients.release import Release
from fp8train.step.non_finite import DivergedError, SkippedSteps
from fp8train.step.result import StepResult
from fp8train.step.trainer import Trainer
from tests.checkpoint.loading import load_checkpoint
from tests.training.tiny import VOCAB, alone, batches, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_MICRO_BATCH = ("train.micro_batch_size=8", "optimizer.clip_grad_norm=0", "model.num_layers=3")
SMALL, BLOCK = "precision.gradient.bucket_mib=0.002", "precision.gradient.bucket_mib=0.02"
CASES: dict[str, list[str]] = {
    "O0": ["precision.level=O0", BLOCK],
    "O0, gpt, tied, selective": [
        *("precision.level=O0", "model.family=gpt", "model.tie_embeddings=true", SMALL),
        "train.activation_checkpointing=selective",
    ],
    "O1, full": ["precision.level=O1", "train.activation_checkpointing=full", SMALL],
    "O1, paper": ["precision.level=O1", "precision.profile=paper", SMALL],
    "O2, gpt": ["precision.level=O2", "model.family=gpt", "model.num_kv_heads=4", SMALL],
    "O2, paper": ["precision.level=O2", "precision.profile=paper", SMALL],
    "O2, delayed": ["precision.level=O2", "precision.recipe=te_delayed", SMALL],
    "O2, umup": ["precision.level=O2", "precision.recipe=umup", SMALL],
    "O2, summed in BF16, ragged rows": [
        *("precision.level=O2", "precision.gradient.fp8.reduce=bf16", BLOCK),
        *("model.hidden_size=40", "model.head_dim=16", "precision.gradient.fp8.block=32"),
    ],
    "O3, tied, full": [
        *("precision.level=O3", "model.tie_embeddings=true", SMALL),
        "train.activation_checkpointing=full",
    ],
    "O3, lion, selective": [
        *("precision.level=O3", "optimizer.name=lion", "optimizer.lr=0.002", BLOCK),
        "train.activation_checkpointing=selective",
    ],
}


def trainer_of(overrides: list[str], *, release: bool, **options: Any) -> Trainer:
    config = tiny_config([*ONE_MICRO_BATCH, *overrides, f"train.gradient_release={str(release).lower()}"])
    return Trainer(config, alone(), vocab_size=VOCAB, **options)


def bits(trainer: Trainer) -> dict[str, bytes]:
    """Of all states, and of the weights as the model has them."""
    tensors = dict(trainer.state_tensors())
    for fqn, parameter in trainer.model.named_parameters():
        linear = trainer.model.linears().get(fqn.removesuffix(".weight"))
        resident = linear is not None and linear.fp8_weight_is_resident
        tensors[f"model/{fqn}"] = linear.fp8_codes() if resident else parameter.detach()
    return {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def train(trainer: Trainer, first: int, last: int) -> list[tuple[float, float, bool]]:
    data = batches(trainer.config, trainer.processes)
    results = [trainer.step(step, data.batch(step)) for step in range(first, last)]
    return [(float(result.loss), result.grad_norm, result.applied) for result in results]


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_bits_of_one_without(name: str, tmp_path: Path) -> None:
    """Losses, norms, states and weights over five steps, the last two after a checkpoint of the third."""
    plain, released = (trainer_of(CASES[name], release=release) for release in (False, True))
    expected, found = train(plain, 0, 3), train(released, 0, 3)
    assert found == expected and bits(released) == bits(plain)
    save_checkpoint(
        tmp_path,
        3,
        released.state_tensors(),
        meta=released.state_meta(),
        rank_state={},
        group=None,
        keep_last=1,
    )
    resumed = trainer_of(CASES[name], release=True)
    loaded = load_checkpoint(tmp_path / "step_00000003", resumed.state_tensors(), group=None)
    resumed.check_meta(loaded.meta)
    resumed.restored(loaded.meta)
    assert train(resumed, 3, 5) == train(plain, 3, 5)
    assert bits(resumed) == bits(plain)
    store = released.store
    assert len(store.lasting) < len(store.buckets), "no bucket shares memory: the case shows nothing"


def test_sampled_statistics_are_those_of_a_run_without() -> None:
    found = []
    for release in (False, True):
        trainer = trainer_of(
            ["precision.level=O2", SMALL, "logging.cast_statistics_interval=1"], release=release
        )
        assert trainer.monitors.recorder is not None
        trainer.monitors.recorder.active = True
        train(trainer, 0, 2)
        found.append((trainer.monitors.cast_rows(), trainer.monitors.optimizer_metrics(trainer.optimizer)))
    assert str(found[0]) == str(found[1]) and found[0][1]  # as text: NaN is NaN


@pytest.mark.parametrize("tied", ["true", "false"])
def test_weights_are_those_of_torch(tied: str) -> None:
    """In FP64, against gradients of autograd alone and ``torch.optim.AdamW``, at every weight."""
    settings = ["precision.level=O0", "precision.compute=fp64", f"model.tie_embeddings={tied}", BLOCK]
    settings += ["schedule.kind=constant", "optimizer.weight_decay=0.2"]
    trainer = trainer_of(settings, release=True)
    config = trainer.config
    truth = build_model(config, vocab_size=VOCAB, device=torch.device("cpu")).model
    initialise(truth, config.run.seed)
    matrices = [p for p in truth.parameters() if p.ndim > 1]
    vectors = [p for p in truth.parameters() if p.ndim == 1]
    rule = config.optimizer
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": rule.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=rule.lr,
        betas=(rule.beta1, rule.beta2),
        eps=rule.eps,
    )
    data = batches(config, alone())
    for step in range(4):
        tokens = data.batch(step)
        trainer.step(step, tokens)
        adamw.zero_grad()
        inputs, targets = tokens[0, :, :-1], tokens[0, :, 1:]
        (truth(inputs, targets) / targets.numel()).backward()
        adamw.step()
        for fqn, parameter in truth.named_parameters():
            found = trainer.model.get_parameter(fqn)
            torch.testing.assert_close(found, parameter, rtol=1e-10, atol=1e-13, msg=f"step {step}: {fqn}")
    assert len(trainer.store.lasting) < len(trainer.store.buckets)


class _WhenBackwardEnds(torch.autograd.Function):
    """The identity; calls a function when the gradient of its input is complete."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Any) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grads[0], None


def changed_too_early(trainer: Trainer) -> list[str]:
    """Parameters that a step changed before the backward of their block was done, and how often it looked."""
    before = {fqn: p.detach().clone() for fqn, p in trainer.model.named_parameters()}
    early, looked = [], []

    def look(path: str) -> None:
        looked.append(path)
        for fqn, parameter in trainer.model.named_parameters():
            if part_of(fqn) == path and not torch.equal(parameter, before[fqn]):
                early.append(fqn)

    for i, block in enumerate(trainer.model.held_blocks()):
        block.register_forward_pre_hook(
            lambda module, args, i=i: (
                _WhenBackwardEnds.apply(args[0], lambda: look(f"layers.{i}")),
                *args[1:],
            )
        )
    train(trainer, 0, 1)
    assert looked[-1] == "layers.0" and set(looked) == {"layers.0", "layers.1", "layers.2"}
    after = {fqn for fqn, p in trainer.model.named_parameters() if not torch.equal(p, before[fqn])}
    assert after == before.keys()
    return early


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_weight_changes_while_backward_may_read_it(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["precision.level=O1", "precision.weights=compute", SMALL]
    settings += [f"train.activation_checkpointing={recompute}"]
    assert changed_too_early(trainer_of(settings, release=True)) == []
    monkeypatch.setattr(Release, "_may_change", lambda self, bucket, part: True)
    assert changed_too_early(trainer_of(settings, release=True)), "the test sees no early update"


def gradient_bytes(overrides: list[str], layers: int) -> int:
    """Of all memory that gradients lie in."""
    trainer = trainer_of([*overrides, f"model.num_layers={layers}"], release=True)
    storages: dict[int, int] = {}
    for bucket in trainer.store.buckets:
        for member in range(len(bucket.members)):
            memory = bucket.storage.buffer(member).untyped_storage()
            storages[memory.data_ptr()] = memory.nbytes()
    return sum(storages.values())


def test_gradients_take_the_memory_of_two_buckets() -> None:
    """Of each block size (rows of 32 and of 64), at any depth; beside what is small or complete only at the
    end: norms, embedding and head in FP32. Codes, without their scales."""
    mib = 0.02
    settings = ["precision.level=O2", f"precision.gradient.bucket_mib={mib}"]
    rows, norm, bucket = 128, 32 * 4, mib * 2**20 / 2  # a padded vocabulary; elements that fill it in BF16
    found = {layers: gradient_bytes(settings, layers) for layers in (16, 32)}
    for layers, nbytes in found.items():
        assert nbytes <= 2 * 2 * bucket + 2 * rows * 32 * 4 + (2 * layers + 1) * norm
    assert found[32] == found[16] + 16 * 2 * norm


def test_gradients_in_high_precision_do_too() -> None:
    settings = ["precision.level=O0", "precision.gradient.bucket_mib=0.06"]
    assert gradient_bytes(settings, 4) == gradient_bytes(settings, 8) <= 2 * 0.06 * 2**20


@contextmanager
def broken_below(trainer: Trainer, layer: int, value: float) -> Iterator[None]:
    """Gradients of this block's output are multiplied: those of later blocks stay as they are."""

    def hook(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * value)

    handle = trainer.model.layers[str(layer)].register_forward_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_a_gradient_that_is_nowhere_finite_changes_nothing(level: str) -> None:
    trainer = trainer_of([f"precision.level={level}", SMALL], release=True)
    data = batches(trainer.config, alone())
    train(trainer, 0, 2)
    before, forward = bits(trainer), trainer.model.forward
    trainer.model.forward = lambda *args: forward(*args) * math.inf  # type: ignore[method-assign]
    result = trainer.step(2, data.batch(2))
    trainer.model.forward = forward  # type: ignore[method-assign]
    assert (result.applied, result.partly, trainer.updates) == (False, False, 2)
    assert not math.isfinite(result.grad_norm) and bits(trainer) == before
    assert trainer.step(3, data.batch(3)).applied and trainer.updates == 3


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_a_step_that_breaks_halfway_is_taken_down_to_there(level: str) -> None:
    """What was updated has the bits of a whole step; what was not, of none; and nothing is NaN."""
    broken, whole = (trainer_of([f"precision.level={level}", SMALL], release=True) for _ in range(2))
    data = batches(broken.config, alone())
    for trainer in (broken, whole):
        train(trainer, 0, 2)
    before = bits(broken)
    with broken_below(broken, 1, math.nan):
        result = broken.step(2, data.batch(2))
    whole.step(2, data.batch(2))
    assert (result.applied, result.partly, broken.updates) == (False, True, 3)
    assert not math.isfinite(result.grad_norm)
    after, expected = bits(broken), bits(whole)
    later, earlier = (
        ("head.weight", "layers.2.attention.qkv", "layers.2.mlp.down"),
        ("layers.1.", "layers.0."),
    )
    changed = 0
    for name in after:
        if "norm" in name:  # in a bucket with those of broken blocks
            continue
        if any(part in name for part in later):
            assert after[name] == expected[name], name
            changed += after[name] != before[name]
        elif any(part in name for part in (*earlier, "embedding")):
            assert after[name] == before[name], name
    assert changed >= 3 * 3  # master and moments of each; scales may stay
    assert train(broken, 3, 4)[0][2] and broken.updates == 4
    assert all(torch.isfinite(t.float()).all() for t in broken.state_tensors().values())


def test_a_step_without_any_target_changes_nothing() -> None:
    trainer = trainer_of(["precision.level=O2", SMALL], release=True, ignore_after=7)
    data = batches(trainer.config, alone())
    assert trainer.step(0, data.batch(0)).applied
    before = bits(trainer)
    result = trainer.step(1, torch.full_like(data.batch(1), 7))
    assert (result.applied, result.partly, result.no_targets) == (False, False, True)
    assert bits(trainer) == before
    assert trainer.step(2, data.batch(2)).applied


def test_steps_taken_partly_count_as_skipped_and_are_told() -> None:
    skipped = SkippedSteps(5)
    broken = StepResult(torch.tensor(1.0), math.nan, 0.1, "not_finite", partly=True)
    for done in range(1, 5):
        skipped.count(done, broken)
    with pytest.raises(DivergedError) as error:
        skipped.count(5, broken)
    assert "the weights are those of step 0" not in str(error.value)
    assert "train.gradient_release" in str(error.value)


def test_gradients_are_gone_after_a_step() -> None:
    trainer = trainer_of(["precision.level=O2", SMALL], release=True)
    train(trainer, 0, 1)
    with pytest.raises(AssertionError, match="not reduced, or released"):
        trainer.store.reader("layers.0.mlp.up.weight").chunk(0, 64)
    assert json.dumps(trainer.state_meta())
