"""Forward and backward of a step as CUDA graphs (``run.cuda_graphs``): recorded once, replayed by one call.

A step of a small model is thousands of launches of a few microseconds each, and the host cannot keep up with
them. A graph repeats the launches that it recorded: the same kernels on the same addresses with the same
numbers, whatever Python would do by now. Recorded is what lies between the store's ``begin_step`` and the
first reduction: casts of weights, forward and backward of all micro-batches, their sums in the buffers of the
gradient store. Reductions, norm, the decision to skip, and the update stay as they are: few launches, whose
tables change from step to step. Why a replay gives the bits of the step that it stands for:

* **Addresses.** Weights, the FP8 copies that the optimizer writes, delayed scales, rows of statistics,
  buffers of the store and residuals are allocated once and written in place, by checkpoints too. Inputs are
  copied into tensors of our own.
* **What forward derives from weights and keeps** (casts of weights held in BF16, turned codes of resident
  ones) must be made anew by every replay: it is forgotten before a recording. It is forgotten behind one too,
  because what was recorded lives in memory that another graph may use.
* **Numbers** that Python hands to a launch are frozen. Those of forward and backward are the same in all
  steps of a *kind*: shapes, whether casts are sampled, which linears the guard took out of FP8, the number of
  targets where it is known. Each kind has its graph. Random bits there depend on data alone.
* **Side effects in Python**: the store's counts, told by ``GradientStore.replayed``. Everything else that a
  step begins or ends (amaxes of delayed scales, grids, residuals) happens outside, eagerly.
* **Waits.** Nothing in there reads from the device, or copies host memory to it.

Each kind runs :data:`WARM_UP` times first: kernels are compiled, libraries take their workspace. These runs
use the stream of the recording, because autograd remembers the streams of its leaves. They also free all
graphs: two sets of activations in memory, the graphs' and their own, would cost what recomputation saves.

Price: the reductions of several data-parallel ranks follow the graph; they do not overlap with backward. A
graph has a node for each launch of all micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

WARM_UP = 2
"""Eager runs of a kind of step before it is recorded: the first allocates what the second finds."""


@dataclass(frozen=True)
class Recording:
    """What was recorded: ``replay`` does it again, and ``result`` has its result then."""

    result: Tensor
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records what a function launches. CUDA's is :class:`CudaGraphs`; tests have one for a CPU."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run it, where recordings are made."""
        ...

    def record(self, function: Callable[[], Tensor]) -> Recording:
        """Call it without running what it launches."""
        ...

    def drop(self) -> None:
        """Free all recordings; none of them is replayed again, and none is running."""
        ...


class CudaGraphs:
    """Records CUDA graphs, which share their memory: one runs at a time, and results are taken at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run it on the stream of recordings, between what is before and behind it on the current one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> Recording:
        """Record one graph; waits for the device, and frees unused memory before."""
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        # Threads of NCCL and of a checkpoint's writer may go on with their calls.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        self._graphs.append(graph)
        return Recording(result, graph.replay)

    def drop(self) -> None:
        """Free all graphs, and the memory that they ran in."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        torch.cuda.empty_cache()


class RecordedStep:
    """Runs a function of tensors and numbers eagerly at first, then from recordings.

    Attributes:
        replays: how often a recording took the function's place.
    """

    def __init__(
        self, recorder: Recorder, function: Callable[..., Tensor], forget: Callable[[], None]
    ) -> None:
        """Args:
        recorder: makes the recordings.
        function: of positional tensors and numbers; what it launches depends on their shapes, on the numbers,
            and on the kind.
        forget: makes ``function`` compute again what it keeps from call to call.
        """
        self._recorder, self._function, self._forget = recorder, function, forget
        self._ran: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Recording] = {}
        self._inputs: dict[Hashable, list[Tensor | float]] = {}
        self.replays = 0

    def __call__(self, kind: Hashable, *arguments: Tensor | float) -> tuple[Tensor, bool]:
        """The function's result, and whether it was replayed: then Python has not run.

        Args:
            kind: what else decides which operations run.
            arguments: of the function.
        """
        described = ((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in arguments)
        key = (kind, *described)
        inputs = self._load(key, arguments)
        if key not in self._recordings:
            if self._ran[key] < WARM_UP:
                self._ran[key] += 1
                self._drop()
                return self._recorder.run(lambda: self._function(*inputs)), False
            self._recordings[key] = self._record(inputs)
        recording = self._recordings[key]
        recording.replay()
        self.replays += 1
        return recording.result.clone(), True  # the next replay overwrites it

    def _load(self, key: Hashable, arguments: tuple[Tensor | float, ...]) -> list[Tensor | float]:
        """The arguments at the addresses that recordings of this key read."""
        if key not in self._inputs:
            self._inputs[key] = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        for own, given in zip(self._inputs[key], arguments, strict=True):
            if isinstance(own, Tensor) and isinstance(given, Tensor):
                own.copy_(given)
        return self._inputs[key]

    def _record(self, inputs: list[Tensor | float]) -> Recording:
        self._forget()
        try:
            return self._recorder.record(lambda: self._function(*inputs))
        except RuntimeError as error:
            error.add_note("while CUDA graphs were recorded; run.cuda_graphs=false trains without them")
            raise
        finally:
            self._forget()

    def _drop(self) -> None:
        if self._recordings:
            self._recordings.clear()
            self._recorder.drop()
