"""Which parameters share a bucket, and which buckets share memory: arithmetic on names and sizes, no torch.

Parameters come in the order in which backward produces their gradients, and fall into buckets of one kind.
Buckets are launched by their last member: one of norms that is complete only at the end must not hold up the
others.

Where gradients are released while backward goes on, the buckets of a kind take turns in a few *places*:
bucket i lies where bucket i - K did. Backward goes through the model part by part (:func:`part_of`), and
nothing of a part is read once a gradient of a later one arrives. So K is the fewest for which the first part
of a bucket comes after the last part of the bucket whose place it takes: then that one is complete, and its
parameters may change, when its place is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Contributor:
    """A parameter: its name, its local elements, the kind of its bucket, and the group of buckets that it is
    in (those of a lower number are launched first)."""

    fqn: str
    numel: int
    kind: str
    group: int = 0


@dataclass(frozen=True)
class PlannedBucket:
    """A bucket before it is made.

    Attributes:
        kind: of storage and reduction.
        members: positions of its parameters, in the order of backward.
        parts: first and last part of the model that it has parameters of, by number in that order.
        place: buckets of one place share memory.
        after: number of the bucket that has the place before it; None for the first, or without sharing.
    """

    kind: str
    members: tuple[int, ...]
    parts: tuple[int, int]
    place: int
    after: int | None = None


def part_of(fqn: str) -> str:
    """The part of the model that a parameter belongs to: what backward is done with at once."""
    names = fqn.split(".")
    if names[0] == "layers":
        return ".".join(names[:2])
    return {"positions": "embedding", "final_norm": "head"}.get(names[0], names[0])


def parts_of(fqns: Iterable[str]) -> list[int]:
    """Number of each parameter's part, counted in the order given."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(part_of(fqn), len(numbers)) for fqn in fqns]


def fewest_places(replicas: int) -> int:
    """Places that a kind has at least where gradients are released: one bucket fills, one waits for its
    verdict to reach the host; with several ranks two more are on their way."""
    return 2 + turns_on_the_way(replicas)


def turns_on_the_way(replicas: int) -> int:
    """How many buckets are launched after one before its sum is waited for: none with one rank, else one
    for each half of the reduction."""
    return 0 if replicas == 1 else 2


def plan_buckets(
    parameters: Sequence[Contributor], capacity: Callable[[str], int], *, places: int | None = None
) -> list[PlannedBucket]:
    """The buckets in launch order.

    Args:
        parameters: in the order of backward.
        capacity: elements of a bucket by kind, approximately; a larger parameter has one to itself.
        places: the fewest that buckets of a kind take turns in; None: each has memory of its own.
    """
    groups: list[tuple[str, list[int]]] = []
    filled: dict[tuple[int, str], tuple[int, int]] = {}  # kind -> (its open bucket, elements in it)
    for position, parameter in enumerate(parameters):
        key = parameter.group, parameter.kind
        number, size = filled.get(key, (-1, 0))
        if number < 0 or size + parameter.numel > capacity(parameter.kind):
            number, size = len(groups), 0
            groups.append((parameter.kind, []))
        groups[number][1].append(position)
        filled[key] = (number, size + parameter.numel)
    groups.sort(key=lambda group: (parameters[group[1][-1]].group, group[1][-1]))
    parts = parts_of(parameter.fqn for parameter in parameters)
    buckets = [
        PlannedBucket(kind, tuple(members), (parts[members[0]], parts[members[-1]]), number)
        for number, (kind, members) in enumerate(groups)
    ]
    return buckets if places is None else _in_turns(buckets, places)


def _in_turns(buckets: list[PlannedBucket], fewest: int) -> list[PlannedBucket]:
    found = list(buckets)
    for kind in dict.fromkeys(bucket.kind for bucket in buckets):
        numbers = [number for number, bucket in enumerate(buckets) if bucket.kind == kind]
        turns = _turns([buckets[number].parts for number in numbers], fewest)
        for i, number in enumerate(numbers[turns:]):
            before = numbers[i]
            found[number] = replace(buckets[number], place=found[before].place, after=before)
    return found


def _turns(parts: Sequence[tuple[int, int]], fewest: int) -> int:
    """Fewest places for buckets of these parts."""
    turns = fewest
    while any(later[0] <= earlier[1] for earlier, later in zip(parts, parts[turns:], strict=False)):
        turns += 1
    return turns
