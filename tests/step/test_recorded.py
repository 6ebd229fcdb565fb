"""Steps from recordings have the bits of eager ones: losses, weights, states, statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.processes import Processes, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.live.describe import describe_precision
from fp8train.step.recorded import WARM_UP, RecordedStep
from fp8train.step.targets import inputs_and_targets
from fp8train.step.trainer import Trainer
from tests.kernels.gpu.same import same
from tests.step.graph_recorder import GraphRecorder, NotRecordable, launched
from tests.training.tiny import VOCAB, alone, batches, tiny_config

GPT = ("model.family=gpt", "model.num_kv_heads=4")
O2, O3 = ("precision.level=O2",), ("precision.level=O3",)
ONE = ("train.global_batch_size=1",)
SEQUENCES = ("train.global_batch_size=3",)  # micro-batches of one


class Run:
    """A trainer, recorded or not, and what it did."""

    def __init__(
        self, overrides: Sequence[str], recorder: GraphRecorder | None, processes: Processes
    ) -> None:
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
    "blocks": ("precision.level=O1", "precision.recipe=blockwise"),
    "FP4": ("precision.level=O1", "precision.recipe=nvfp4_simulated"),
    "channels": (
        "precision.level=O1",
        "precision.weights=compute",
        "precision.gemm.smooth_swiglu=channel",
    ),
    "FP64": ("precision.compute=fp64",),
    "feedback": (*O2, *ONE, "precision.gradient.fp8.error_feedback=true"),
    "feedback of sums": (*O2, "precision.gradient.fp8.error_feedback=true"),
    "lean": (*O2, "precision.state.plan=lean"),
}


IN_LAYERS = ("O0", "O2", "delayed", "static", "rows", "feedback")  # in a CPU's branches too


@pytest.mark.parametrize(
    ("name", "fuse"), [*((name, True) for name in SETTINGS), *((name, False) for name in IN_LAYERS)]
)
def test_recorded_steps_have_the_bits_of_eager_ones(name: str, fuse: bool) -> None:
    run, recorder = assert_same_bits(SETTINGS[name], uneventful, fuse=fuse)
    assert run.trainer.recorded is not None
    assert run.trainer.recorded.replays == 5
    assert len(recorder.made) == 1 and recorder.made[0] > 50
    losses = [loss for loss, _, _ in run.seen]
    assert losses[-1] < losses[0]


SAMPLED = "logging.cast_statistics_interval=5"  # the stories say which steps are
EVENTFUL = {
    "O0": ("precision.level=O0",),
    "O1": ("precision.level=O1", SAMPLED),
    "O2": (*O2, SAMPLED),
    "O2, one micro-batch": (*O2, *ONE, SAMPLED, "precision.gradient.fp8.error_feedback=true"),
    "delayed": ("precision.profile=paper", *O2, SAMPLED),
    "FP8 head": (*O2, "precision.gemm.head=fp8", SAMPLED),
    "rows": ("precision.level=O1", "precision.recipe=rowwise", SAMPLED),
    "requantise": (*O2, "precision.gemm.keep_w=requantise", "precision.gemm.grad_input.w.margin=1", SAMPLED),
}


@pytest.mark.parametrize("name", EVENTFUL)
def test_what_happens_between_steps_is_not_forgotten(name: str) -> None:
    run, recorder = assert_same_bits(EVENTFUL[name], eventful, fuse=name != "O0")
    assert run.trainer.recorded is not None
    if SAMPLED not in EVENTFUL[name]:
        assert (len(recorder.made), recorder.dropped, run.trainer.recorded.replays) == (1, 0, 11)
        return
    # Sampled steps run twice before theirs is recorded, and the first of them drops what there was.
    assert (len(recorder.made), recorder.dropped) == (3, 1)
    assert run.trainer.recorded.replays == 11 - 2


def test_a_linear_that_leaves_fp8_is_recorded_anew() -> None:
    def guarded(run: Run) -> None:
        run.steps(WARM_UP + 1)
        guard = run.trainer.monitors.guard
        assert guard is not None
        guard.locked["layers.0.mlp.up"] = run.done + WARM_UP + 2
        run.trainer.monitors._apply_guard()
        run.steps(WARM_UP + 4)
        assert not guard.locked

    settings = ("precision.gemm.fp8=true", SAMPLED, "precision.guard.action=bf16")
    _, recorder = assert_same_bits(settings, guarded)
    assert (len(recorder.made), recorder.dropped) == (3, 1)
    different = sum(one != recorder.made[0] for one in recorder.made)
    assert different == 1, "the second, without casts of one linear"


def test_batches_that_leave_targets_out_have_a_number_on_the_device() -> None:
    def story(run: Run) -> None:
        run.trainer.ignore_after = 7
        run.steps(WARM_UP + 4)

    _, recorder = assert_same_bits(O2, story)
    assert len(recorder.made) == 1


def on_a_rank(group: dist.ProcessGroup, rank: int, world_size: int, *overrides: str) -> tuple[int, int]:
    """Runs in the pool."""

    def processes() -> Processes:
        return joined_processes(torch.device("cpu"))

    settings = ("train.global_batch_size=4", *overrides)
    run, recorder = assert_same_bits(settings, uneventful, fuse=True, processes=processes)
    assert run.trainer.recorded is not None
    return len(recorder.made), run.trainer.recorded.replays


@pytest.mark.parametrize(
    "settings",
    [("precision.level=O0", "parallel.zero=1"), O2, (*O3, "parallel.zero=1")],
    ids=["O0 ZeRO", "O2", "O3 ZeRO"],
)
def test_ranks_reduce_behind_the_replay(gloo_pool: Any, settings: tuple[str, ...]) -> None:
    assert gloo_pool.run(on_a_rank, 2, *settings) == [(1, 5), (1, 5)]


def changes_a_number(run: Run) -> None:
    for _ in range(WARM_UP + 2):
        run.trainer.model.final_norm.eps *= 2
        run.steps(1)


def replaces_a_tensor(run: Run) -> None:
    for _ in range(WARM_UP + 2):
        weight = run.trainer.model.final_norm.weight
        weight.data = weight.data.clone()
        run.steps(1)


def keeps_a_cast(run: Run) -> None:
    if run.trainer.recorded is not None:
        run.trainer.recorded._forget = lambda: None
    run.steps(WARM_UP)
    run.evaluate()  # which casts the weights that the recording needs
    run.steps(2)


@pytest.mark.parametrize(
    ("story", "noticed"),
    [(changes_a_number, AssertionError), (replaces_a_tensor, NotRecordable), (keeps_a_cast, NotRecordable)],
)
def test_what_must_not_be_frozen_is_noticed(story: Callable[[Run], None], noticed: type[Exception]) -> None:
    with pytest.raises(noticed):
        assert_same_bits(("precision.gemm.fp8=true",), story)


@pytest.mark.parametrize(
    ("look", "told"),
    [
        (lambda x: x.sum().item(), "host waits for values: _local_scalar_dense"),
        (lambda x: x.sum().tolist(), "host waits for values: tolist"),
        (lambda x: x[x > 0], "depends on values"),
        (lambda x: x + torch.tensor(1.0), "host memory"),
        (lambda x: x + x.new_tensor([1.0]), "host memory"),
        (lambda x: x + torch.randn(1), "random numbers"),
    ],
)
def test_what_a_capture_forbids_is_refused(look: Callable[[Tensor], Any], told: str) -> None:
    def story(run: Run) -> None:
        loss = run.trainer.model.loss

        def looking(hidden: Tensor, targets: Tensor) -> Tensor:
            look(hidden.detach())
            return loss(hidden, targets)

        run.trainer.model.loss = looking  # type: ignore[method-assign]
        run.steps(WARM_UP + 1)

    with launched(fuse=False), pytest.raises(NotRecordable, match=told):
        story(Run(("precision.level=O0",), GraphRecorder(), alone()))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.compile=block parallel.pp=2", r"parallel.pp: 2 comm[\s\S]*train.compile: block is"),
        ("train.compile=block", "train.compile: block is not recorded yet; write train.compile: off"),
        ("parallel.tp=2", "parallel.tp: 2 communicates within blocks; write parallel.tp: 1"),
        ("parallel.cp=2", "parallel.cp: 2 communicates within blocks; write parallel.cp: 1"),
        ("parallel.pp=2", "parallel.pp: 2 communicates between blocks; write parallel.pp: 1"),
        ("precision.gradient.fp8.reduce=exact", "exact makes new grids for each step; write precision.grad"),
    ],
)
def test_what_is_not_recorded_is_refused(setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_config(["run.cuda_graphs=true", "run.threads=1", "precision.level=O2", *setting.split()])


def test_the_header_of_a_run_says_so() -> None:
    line = "forward and backward: CUDA graphs, after 2 steps without"
    said = [describe_precision(Run(O2, recorder, alone()).trainer) for recorder in (GraphRecorder(), None)]
    assert [line in lines for lines in said] == [True, False]


def test_recording_changes_nothing_until_it_is_replayed() -> None:
    x, total = torch.ones(3), torch.zeros(3)
    recording = GraphRecorder().record(lambda: total.add_(x * 2))
    assert total.tolist() == [0, 0, 0]
    x.fill_(2.0)
    recording.replay()
    assert total.tolist() == [4, 4, 4] and recording.result.tolist() == [4, 4, 4]


def test_memory_that_is_free_is_not_read() -> None:
    table, x = torch.ones(3), torch.ones(3)
    recording = GraphRecorder().record(lambda: x + table)
    recording.replay()
    assert recording.result.tolist() == [2, 2, 2]
    table = torch.ones(3)  # equal, but elsewhere
    with pytest.raises(NotRecordable, match="free by now"):
        recording.replay()


def test_kinds_have_recordings_of_their_own() -> None:
    recorder = GraphRecorder()
    step = RecordedStep(recorder, lambda x, factor: x * factor, lambda: None)
    x = torch.ones(2)
    for number in range(2 * (WARM_UP + 2)):
        factor = float(number % 2)
        x.fill_(number)
        result, replayed = step("kind", x, factor)
        assert result.tolist() == [number * factor] * 2
        assert replayed == (number >= 2 * WARM_UP)
    assert (len(recorder.made), recorder.dropped, step.replays) == (2, 0, 4)
    assert step("another kind", x, 1.0)[1] is False, "what was not seen yet runs eagerly,"
    assert recorder.dropped == 1, "and not beside the memory of recordings"
