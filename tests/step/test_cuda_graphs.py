"""What :class:`~fp8train.step.recorded.CudaGraphs` asks of torch, where there is no CUDA: order of streams,
memory of graphs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock, call, patch

import pytest
import torch

from fp8train.step.recorded import CudaGraphs


@pytest.fixture
def cuda() -> Any:
    names = ("Stream", "CUDAGraph", "graph", "stream", "current_stream", "empty_cache")
    made = MagicMock()
    made.stream.side_effect = made.graph.side_effect = lambda *args, **kwargs: nullcontext()
    made.CUDAGraph.side_effect = lambda: MagicMock()
    with patch.multiple(torch.cuda, **{name: getattr(made, name) for name in names}):
        yield made


def test_eager_runs_lie_between_what_is_before_and_behind_them(cuda: Any) -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    side, current = cuda.Stream.return_value, cuda.current_stream.return_value
    cuda.reset_mock()
    assert graphs.run(cuda.launched) is cuda.launched.return_value
    assert cuda.mock_calls == [
        call.current_stream(torch.device("cuda", 0)),
        call.Stream().wait_stream(current),
        call.stream(side),
        call.launched(),
        call.current_stream().wait_stream(side),
    ]


def test_graphs_share_memory_until_they_are_dropped(cuda: Any) -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    result = torch.ones(1)
    first, _ = (graphs.record(lambda: result) for _ in range(2))
    (graph, second), pools = [c.args[0] for c in cuda.graph.mock_calls], cuda.graph.mock_calls
    assert [c.kwargs["pool"] for c in pools] == [None, graph.pool.return_value]
    assert {c.kwargs["stream"] for c in pools} == {cuda.Stream.return_value}
    first.replay()
    assert first.result is result
    graph.replay.assert_called_once_with()
    graphs.drop()
    graph.reset.assert_called_once_with()
    second.reset.assert_called_once_with()
    graphs.record(lambda: result)
    assert cuda.graph.mock_calls[-1].kwargs["pool"] is None
