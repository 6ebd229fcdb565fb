"""The pool itself: results by rank, fresh state per run, and every way a worker can fail."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from fp8train.config.errors import UserError
from tests.distributed.pool import GlooPool, WorkerFailure


def summed(group, rank, world_size, start):
    x = torch.tensor(float(start + rank))
    dist.all_reduce(x)  # the default group
    y = torch.tensor(float(rank))
    dist.all_reduce(y, group=group)
    return rank, world_size, x.item(), y.item(), torch.get_num_threads()


def codes(group, rank, world_size, x):
    return (x + rank).to(torch.float8_e4m3fn)


def process_id(group, rank, world_size):
    return os.getpid()


def dirty(group, rank, world_size):
    before = (torch.get_default_dtype(), os.environ.get("DIRTY"), torch.rand(1).item())
    torch.set_default_dtype(torch.float64)
    os.environ["DIRTY"] = "1"
    return before


def fails_on(group, rank, world_size, bad_rank, kind):
    if rank == bad_rank:
        if kind == "raise":
            raise UserError("rank-specific trouble")
        if kind == "local class":

            class Unpicklable(Exception):
                pass

            raise Unpicklable("cannot travel")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(7)
    dist.barrier()


def hangs_on(group, rank, world_size, bad_rank):
    if rank == bad_rank:
        time.sleep(600)


def joins_alone(group, rank, world_size):
    assert group is None
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    x = torch.ones(())
    dist.all_reduce(x)
    return x.item(), os.environ["LOCAL_WORLD_SIZE"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_has_its_result(gloo_pool: GlooPool, world_size: int) -> None:
    n = world_size
    expected = [(r, n, float(sum(range(10, 10 + n))), float(sum(range(n))), 1) for r in range(n)]
    assert gloo_pool.run(summed, n, 10) == expected


def test_tensors_travel_as_copies(gloo_pool: GlooPool) -> None:
    x = torch.tensor([1.0, 2.5, -448.0])
    a, b = gloo_pool.run(codes, 2, x)
    assert a.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(a.float(), x)
    torch.testing.assert_close(b.float(), torch.tensor([2.0, 3.5, -448.0]))  # -447 rounds to -448


def test_workers_stay_and_their_state_does_not(gloo_pool: GlooPool) -> None:
    first = gloo_pool.run(process_id, 2)
    clean = gloo_pool.run(dirty, 2)
    assert gloo_pool.run(dirty, 2) == clean
    assert clean[0][:2] == (torch.float32, None)
    assert gloo_pool.run(process_id, 2) == first


def test_a_function_may_join_by_itself(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(joins_alone, 3, join=False) == [(3.0, "3")] * 3


def test_an_exception_arrives_with_its_traceback(gloo_pool: GlooPool) -> None:
    workers = gloo_pool.run(process_id, 2)
    with pytest.raises(UserError, match="rank-specific trouble") as caught:
        gloo_pool.run(fails_on, 2, 1, "raise")
    note = "".join(caught.value.__notes__)
    assert "on rank 1 of 2" in note
    assert 'raise UserError("rank-specific trouble")' in note
    assert gloo_pool.run(process_id, 2) == workers  # an exception is no reason to replace a worker


def test_an_exception_that_cannot_be_pickled_is_described(gloo_pool: GlooPool) -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: cannot travel"):
        gloo_pool.run(fails_on, 1, 0, "local class")


@pytest.mark.parametrize(("kind", "said"), [("kill", "exit code -9"), ("exit", "exit code 7")])
def test_a_dead_worker_is_named_and_replaced(gloo_pool: GlooPool, kind: str, said: str) -> None:
    before = gloo_pool.run(process_id, 2)
    with pytest.raises(WorkerFailure, match=f"rank 1 died with {said}"):
        gloo_pool.run(fails_on, 2, 1, kind)
    after = gloo_pool.run(process_id, 2)
    assert before[1] not in after
    assert gloo_pool.run(summed, 2, 0)[1][2] == 1.0


def test_a_hung_worker_is_named_with_its_stack(gloo_pool: GlooPool) -> None:
    before = gloo_pool.run(process_id, 2)  # started: the time limit is the function's alone
    with pytest.raises(WorkerFailure, match=r"^rank 1 hung \(limit 5 s\)") as caught:
        gloo_pool.run(hangs_on, 2, 1, timeout=5.0, join=False)
    assert "in hangs_on" in str(caught.value)
    after = gloo_pool.run(process_id, 2)
    assert before[0] in after
    assert before[1] not in after
