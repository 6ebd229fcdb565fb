"""Steps from recordings have the bits of eager ones: losses, weights, states, statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.comm.processes import Processes
from fp8train.step.recorded import WARM_UP
from fp8train.step.targets import inputs_and_targets
from fp8train.step.trainer import Trainer
from tests.kernels.gpu.same import same
from tests.step.graph_recorder import GraphRecorder, NotRecordable, launched
from tests.training.tiny import VOCAB, alone, batches, tiny_config

GPT = ("model.family=gpt", "model.num_kv_heads=4")
O2, O3 = ("precision.level=O2",), ("precision.level=O3",)
ONE = ("train.global_batch_size=1",)
SEQUENCES = ("train.global_batch_size=3",)  # micro-batches of one
EVENTFUL = 14
"""Steps of a run in which something happens."""


class Run:
    """A trainer, recorded or not, and what it did."""

    def __init__(self, overrides: Sequence[str], recorder: GraphRecorder | None, processes: Processes) -> None:
        graphs = "true" if recorder is not None else "false"
        self.config = tiny_config([*SEQUENCES, *overrides, f"run.cuda_graphs={graphs}"])
        self.trainer = Trainer(self.config, processes, vocab_size=VOCAB, recorder=recorder)
        self.data, self.done = batches(self.config, processes), 0
        self.seen: list[Any] = []

    def steps(self, count: int, *, sampled: bool = False) -> None:
        """Train, and note what a step returns."""
        recorder = self.trainer.monitors.recorder
        for _ in range(count):
            if recorder is not None:
                recorder.active = sampled
            result = self.trainer.step(self.done, self.data.batch(self.done))
            if recorder is not None:
                recorder.active = False
                self.seen.append(recorder.rows.clone())
            self.seen.append((float(result.loss), result.grad_norm, result.applied))
            self.done += 1

    def evaluate(self) -> None:
        """A forward pass without gradients."""
        tokens = inputs_and_targets(self.data.batch(99), None)
        self.seen.append(float(self.trainer.summed_loss(*tokens)))

    def skip(self) -> None:
        """A step whose gradients are NaN."""
        weight = self.trainer.model.final_norm.weight.detach()
        before = weight.clone()
        weight.fill_(torch.nan)
        self.steps(1)
        assert self.seen[-1][2] is False
        weight.copy_(before)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A checkpoint."""
        tensors = {**self.trainer.state_tensors(), **self.trainer.rank_tensors()}
        return {name: tensor.clone() for name, tensor in tensors.items()}, self.trainer.state_meta()

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Go back to it."""
        for name, tensor in {**self.trainer.state_tensors(), **self.trainer.rank_tensors()}.items():
            tensor.copy_(tensors[name])
        self.trainer.restored(meta)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has values now."""
        return {**self.trainer.model.state_dict(), **self.saved()[0]}


def uneventful(run: Run) -> None:
    run.steps(WARM_UP + 5)


def eventful(run: Run) -> None:
    """Evaluations before and behind recordings, sampled steps, a skipped one, a restart."""
    run.steps(WARM_UP)
    run.evaluate()
    run.steps(2)
    run.skip()
    run.evaluate()
    checkpoint = run.saved()
    run.steps(1)
    run.load(*checkpoint)
    for sampled in (False, True, True, True, False):
        run.steps(1, sampled=sampled)
    run.evaluate()
    run.steps(2)


def assert_same_bits(
    overrides: Sequence[str],
    story: Callable[[Run], None],
    *,
    fuse: bool = False,
    processes: Callable[[], Processes] = alone,
) -> tuple[Run, GraphRecorder]:
    """Live through ``story`` twice. Returns the recorded run."""
    recorder = GraphRecorder()
    with launched(fuse=fuse):
        eager, recorded = (Run(overrides, r, processes()) for r in (None, recorder))
        story(eager)
        story(recorded)
    assert len(eager.seen) == len(recorded.seen)
    for place, (one, other) in enumerate(zip(eager.seen, recorded.seen, strict=True)):
        if isinstance(one, Tensor):
            assert same(one, other), place
        else:
            assert str(one) == str(other), place  # NaN is not equal to itself
    for name, tensor in eager.tensors().items():
        assert same(tensor, recorded.tensors()[name]), name
    return recorded, recorder


SETTINGS = {
    "O0": ("precision.level=O0",),
    "O0, one micro-batch": ("precision.level=O0", *ONE),
    "GEMMs": ("precision.gemm.fp8=true",),
    "O1": ("precision.level=O1",),
    "O2": O2,
    "O2, one micro-batch": (*O2, *ONE),
    "O2, GPT": (*O2, *GPT),
    "O2, GPT with biases": (*O2, *GPT, "model.bias=true", "model.positions=learned"),
    "O2, tied": (*O2, "model.tie_embeddings=true"),
    "O2, recomputed": (*O2, "train.activation_checkpointing=full"),
    "O2, selectively": (*O2, "train.activation_checkpointing=selective"),
    "O3": O3,
    "O3, one micro-batch": (*O3, *ONE),
    "delayed": ("precision.level=O1", "precision.recipe=te_delayed"),
    "delayed, resident": ("precision.profile=paper", *O2),
    "constant": ("precision.level=O1", "precision.recipe=cscale"),
    "static": ("precision.recipe=mus", *O2),
    "rows": ("precision.level=O1", "precision.recipe=rowwise"),
    "FP64": ("precision.compute=fp64",),
    "feedback": (*O2, *ONE, "precision.gradient.fp8.error_feedback=true"),
    "feedback of sums": (*O2, "precision.gradient.fp8.error_feedback=true"),
}


@pytest.mark.parametrize("fuse", [False, True], ids=["layers", "fused"])
@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_steps_have_the_bits_of_eager_ones(name: str, fuse: bool) -> None:
    run, recorder = assert_same_bits(SETTINGS[name], uneventful, fuse=fuse)
    assert run.trainer.recorded is not None
    assert run.trainer.recorded.replays == 5
    assert len(recorder.made) == 1 and recorder.made[0] > 100
    losses = [loss for loss, _, _ in run.seen]
    assert losses[-1] < losses[0]
