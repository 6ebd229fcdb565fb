"""Fixtures and rules for all tests."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from fp8train.kernels import matmul
from tests.distributed.pool import GlooPool
from tests.faults.table import all_tests

# Shared machines make single examples slow; the seed of a failure is printed.
hypothesis.settings.register_profile("fp8train", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fp8train")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run in Triton's interpreter, unless only the tests that need a GPU are run, on one. Triton
    reads the variable when it is imported, which is later."""
    on_gpu = config.option.markexpr == "gpu" and torch.cuda.is_available()
    os.environ.setdefault("TRITON_INTERPRET", str(int(not on_gpu)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    of_table = {f"tests/{test}" for test in all_tests()}
    for item in items:
        if item.nodeid.partition("[")[0] in of_table:
            item.add_marker("faults")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Persistent gloo workers; see tests/distributed/pool.py."""
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(params=[False, True], ids=["cpu_without_bf16", "cpu_with_bf16"])
def each_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both answers to "does this CPU multiply BF16", whatever the machine says: products that are widened to
    FP32, and torch's own. What is compiled keeps the answer that it was compiled with."""
    multiplies: bool = request.param
    monkeypatch.setattr(matmul, "_cpu_multiplies_bf16", lambda: multiplies)
    return multiplies


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The test's own process as the pool's are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
