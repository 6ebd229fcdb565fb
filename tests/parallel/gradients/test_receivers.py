"""Where the parts of a message lie, and when scattering is worth it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.gradients.gradient_buckets import GradientBuckets, Groups
from fp8train.parallel.gradients.receivers import (
    Member,
    Owners,
    by_place_in_node,
    places_of,
    row_elements,
)
from fp8train.parallel.zero import Kind, partition
from fp8train.precision.gradients import Fp8Gradients, Gradients
from fp8train.precision.number_formats import E4M3

SHAPES = {"a": (12, 3), "b": (5, 2), "c": (7,), "d": (2, 4)}
MEMBERS = [Member(fqn, shape) for fqn, shape in SHAPES.items()]


@pytest.mark.parametrize("kind", ["rows", "whole_tensor"])
@pytest.mark.parametrize("order", [tuple(range(4)), by_place_in_node(4, 2)])
def test_every_owner_finds_its_rows_at_its_place(kind: Kind, order: tuple[int, ...]) -> None:
    owners = partition(SHAPES, 4, kind)
    values = {fqn: torch.arange(1.0, 1 + torch.Size(shape).numel()) for fqn, shape in SHAPES.items()}
    flat = torch.cat(list(values.values()))
    seen: dict[str, list[Tensor]] = {fqn: [] for fqn in SHAPES}
    for rank in range(4):
        places = places_of(Owners(owners, rank, order), MEMBERS, row_elements(MEMBERS))
        message = places.arrange(flat).view(4, -1)
        assert message.numel() == places.message
        own = message[order.index(rank)]
        for i, member in enumerate(MEMBERS):
            part = own[places.held[i]]
            rows = owners.owners[member.fqn][rank]
            assert torch.equal(part, values[member.fqn].view(member.shape)[rows.start : rows.stop].flatten())
            seen[member.fqn].append(part)
    assert all(torch.equal(torch.cat(parts), values[fqn]) for fqn, parts in seen.items())


def test_places_in_nodes() -> None:
    """Ranks 0 to 5 on nodes of 3: both first places, both second, both third."""
    assert by_place_in_node(6, 3) == (0, 3, 1, 4, 2, 5)


@pytest.mark.parametrize("reduce", ["exact", "shared_scale"])
@pytest.mark.parametrize(("kind", "scattered"), [("rows", True), ("whole_tensor", False)])
def test_a_message_of_padding_goes_to_everyone(reduce: str, kind: Kind, scattered: bool) -> None:
    """One matrix that one of eight ranks owns: eight parts of its length; an all-reduce sends it twice."""
    shapes = {"w": (64, 64)}
    group = CountedGroup(None)
    group.size = 8
    plan = GradientBuckets(
        {"w": torch.zeros(64, 64)},
        Gradients(bucket_mib=1.0, format=E4M3, fp8=Fp8Gradients(reduce=reduce)),  # type: ignore[arg-type]
        groups=Groups(group),
        device=torch.device("cpu"),
        in_fp8_plan=["w"],
        contributions=2,
        owners=partition(shapes, 8, kind),
    )
    bucket = plan.make("fp8", [Member("w", (64, 64))])
    assert bucket.scattered == scattered
