"""Who is blamed for a hang: simulated jobs in which that is known."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fp8train.comm.calls import Wait
from fp8train.watch.heartbeat import Group, Heartbeat
from fp8train.watch.process import Identity
from fp8train.watch.verdict import Picture, decide
from tests.watch.simulated import Job

MESHES = [
    {"dp": 2},
    {"dp": 4},
    {"dp": 2, "tp": 2},
    {"dp": 2, "pp": 2},
    {"dp": 2, "pp": 2, "tp": 2},
    {"pp": 4},
    {"dp": 3, "pp": 3},
    {"dp": 2, "cp": 2, "tp": 2},
]


def random_program(generator: random.Random, job: Job, axes: dict[str, int]) -> list[tuple]:
    """A step: computes, collectives of random groups, some of which overlap; a stop agreement at the end."""
    wide = " x ".join(axes)
    program: list[tuple] = [("compute",)]
    if "pp" in axes:
        program.append(("stages", generator.randint(1, 3)))
    for _ in range(generator.randint(1, 6)):
        kind = generator.choice(["call", "begin", "compute", "wait"])
        names = [name for name in job.groups if len(job.groups[name][0]) > 1]
        program.append((kind, generator.choice(names)) if kind in ("call", "begin") else (kind,))
    return [*program, ("wait",), ("call", wide, "everyone"), ("sync",), ("call", wide, "host")]


@pytest.mark.parametrize("blocking", [True, False], ids=["gloo", "nccl"])
@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "-".join(f"{k}{v}" for k, v in axes.items()))
def test_the_rank_that_hangs_is_named(axes: dict[str, int], blocking: bool) -> None:
    generator = random.Random(f"{axes} {blocking}")
    for _ in range(60):
        job = Job(blocking=blocking, **axes)
        program = random_program(generator, job, axes)
        rank = generator.randrange(job.size)
        job.run(program, stuck={rank: generator.randrange(0, 2 * len(program))})
        pictures = job.pictures()
        if all(picture.heartbeat.phase == "ended" for picture in pictures.values()):
            continue  # it was to hang later than the run lasted
        verdict = decide(pictures, still_s=600)
        if pictures[rank].wait is not None:  # it hangs in a wait that could end; peers may be as far
            assert verdict.kind == "inside"
            assert rank in verdict.guilty or not verdict.guilty
            continue
        assert (verdict.kind, verdict.guilty) == ("behind", (rank,)), (program, verdict)
        assert (
            f"rank {rank} (host host{rank // 2}, pid {100 + rank}) has not moved for 600 s" in verdict.message
        )


def test_two_ranks_that_hang_are_both_named() -> None:
    job = Job(dp=4)
    job.run([("compute",), ("call", "dp"), ("compute",)], stuck={1: 4, 3: 3})
    assert decide(job.pictures(), still_s=9).guilty == (1, 3)


def stopped(pictures: dict[int, Picture], rank: int, **how: object) -> dict[int, Picture]:
    return pictures | {rank: replace(pictures[rank], **how)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"state": "stopped"}, "stopped (its process does not run)"),
        ({"state": "gone"}, "gone (its process has ended)"),
        (
            {"silent": True, "state": "runs"},
            "no sign of life (its process exists, but something holds Python's interpreter lock)",
        ),
        ({"silent": True}, "no sign of life (its process does not run, or its machine is gone)"),
    ],
)
def test_a_process_that_does_not_run_is_to_blame_even_inside_a_collective(how: dict, said: str) -> None:
    job = Job(dp=2, tp=2)
    job.run([("compute",), ("call", "tp"), ("call", "dp")], stuck={3: 1})
    verdict = decide(stopped(job.pictures(), 2, **how), still_s=61.2)
    assert (verdict.kind, verdict.guilty) == ("stopped", (2,))
    assert verdict.message.startswith("rank 2 (host host1, pid 102) has not moved for 61 s: step 1, phase ")
    assert verdict.message.endswith(said)


def beats(waits: list[Wait | None], entered: list[int], **fields: object) -> dict[int, Picture]:
    ranks = tuple(range(len(waits)))
    return {
        rank: Picture(
            Heartbeat(
                rank,
                Identity("a", rank, "", 0),
                step=4,
                phase="reduce",
                groups=(Group("dp", ranks, entered[rank], entered[rank] - 1, wait),),
            )
        )
        for rank, wait in enumerate(waits)
    }


def test_nobody_is_blamed_where_all_have_entered_the_same_collective() -> None:
    verdict = decide(beats([Wait(7, "all_reduce/norm")] * 3, [7] * 3), still_s=600)
    assert (verdict.kind, verdict.guilty) == ("inside", ())
    assert (
        "all_reduce/norm of dp, step 5, phase reduce): the network, a collective or a device"
        in verdict.message
    )


def test_nobody_is_blamed_where_all_stand_at_the_same_place() -> None:
    verdict = decide(beats([None] * 2, [7] * 2), still_s=600)
    assert (verdict.kind, verdict.guilty) == ("together", ())
    assert "all 2 ranks stood still for 600 s: step 5, phase reduce; nobody is behind" in verdict.message


def test_ranks_in_collectives_of_different_groups_wait_for_each_other() -> None:
    """As where one evaluates and the other saves: neither is behind."""
    pictures = {}
    for rank, name in enumerate(("dp", "control")):
        groups = [
            Group(n, (0, 1), 3 + (n == name), 3, Wait(4, "x") if n == name else None)
            for n in ("dp", "control")
        ]
        pictures[rank] = Picture(Heartbeat(rank, Identity("a", rank, "", 0), groups=tuple(groups)))
    verdict = decide(pictures, still_s=600)
    assert (verdict.kind, verdict.guilty) == ("crossed", (0, 1))
    assert "rank 0 is in x of dp, before the first step" in verdict.message


def test_one_process_is_named_with_its_phase() -> None:
    beat = Heartbeat(0, Identity("a", 1, "", 0), step=11, phase="data")
    verdict = decide({0: Picture(beat)}, still_s=30)
    assert verdict.guilty == (0,)
    assert verdict.message == "the process stood still for 30 s: step 12, phase data"


def test_a_rank_that_has_left_is_named_by_that() -> None:
    job = Job(dp=2)
    job.run([("compute",), ("call", "dp")], stuck={1: 1})
    pictures = job.pictures()
    left = replace(pictures[1], heartbeat=replace(pictures[1].heartbeat, phase="ended"))
    assert (
        "rank 1 (host host0, pid 101) has left the run, " in decide(pictures | {1: left}, still_s=9).message
    )


def test_a_message_is_waited_for_from_its_sender_alone() -> None:
    """Ring of three: 0 waits for 2, which has not come; 1 has, and waits for 0."""
    waits = [Wait(5, "send and receive", (1, 2)), Wait(5, "send and receive", (2, 0)), None]
    assert decide(beats(waits, [5, 5, 4]), still_s=9).guilty == (2,)


def test_a_rank_in_an_earlier_phase_is_behind_where_no_collective_is_counted() -> None:
    """As under DeepSpeed."""
    phases = ["optimizer", "data", "optimizer"]
    pictures = {
        rank: Picture(Heartbeat(rank, Identity("a", rank, "", 0), step=3, phase=phase))
        for rank, phase in enumerate(phases)
    }
    assert decide(pictures, still_s=9).guilty == (1,)
