"""Whose fault was it? Which rank and which part of the model a step that went wrong began in.

Everything here runs after such a step alone; until then a rank only keeps one number per bucket of its own
gradients, before they are added to those of others
(:meth:`~fp8train.parallel.gradients.bucket.Storage.own_sum`).

**Not finite.** Sums over ranks spread a NaN to everyone. Where some rank's own loss is not finite, forward
runs once more, and the first module whose output is not finite is named. Else the parameter nearest to the
loss whose gradient is not finite is: backward went from there to all below; and the ranks whose own share of
it is not.

**Corruption.** With ``spikes.rerun`` a suspicious step has run twice, from the same state and in the same
order. Numbers of a rank that are not the same bits are a fault of its machine: memory, a kernel, a link that
its inputs came over. Ranks that hold parts of one model send each other activations, so all of them may
differ, and are named. If every rank's own numbers are the same and only the sums differ, the reduction is at
fault; if all are the same, data or model are.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.checkpoint.ranks import Ranks
from fp8train.comm.processes import Processes
from fp8train.step.measured import Measured
from fp8train.step.result import StepEvent

OwnSums = Mapping[tuple[str, ...], float]
"""By the parameters of a bucket, in the order of backward: what this rank contributed, as one number."""
SHOWN = 8


@dataclass(frozen=True)
class _Rank:
    """What one rank knows of a step."""

    rank: int
    host: str
    found: Any


def _everyone(processes: Processes, found: Any) -> list[_Rank]:
    own = _Rank(processes.rank, socket.gethostname(), found)
    return Ranks(processes.control).each(lambda: own)


def _named(ranks: Sequence[_Rank]) -> str:
    shown = ", ".join(f"{one.rank} ({one.host})" for one in ranks[:SHOWN])
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"


def _who(ranks: Sequence[_Rank]) -> dict[str, list[Any]]:
    return {"ranks": [one.rank for one in ranks], "hosts": sorted({one.host for one in ranks})}


@dataclass(frozen=True)
class _NotFinite:
    """One rank's part in a step that is not finite.

    Attributes:
        loss: its own, or the sum over ranks, is a number.
        parameters: whose reduced gradients, as far as it holds them, are not finite.
        own: those of buckets to which its own contribution was not.
    """

    loss: bool
    parameters: list[str]
    own: list[str]


def trace_non_finite(
    processes: Processes,
    measured: Measured,
    norms: Mapping[str, float],
    own_sums: OwnSums,
    *,
    order: Sequence[str],
    first_module: Callable[[], str | None],
) -> StepEvent:
    """Say where a step stopped being finite. Collective over all ranks.

    Args:
        processes: this one and its peers.
        measured: the step.
        norms: of the reduced gradients that this rank holds.
        own_sums: what it contributed.
        order: of the model's parameters, from input to loss.
        first_module: runs forward again and names the first module whose output is not finite.
    """
    own = _NotFinite(
        loss=math.isfinite(float(measured.own_total)),
        parameters=[fqn for fqn, norm in norms.items() if not math.isfinite(norm)],
        own=[fqn for fqns, value in own_sums.items() if not math.isfinite(value) for fqn in fqns],
    )
    everyone = _everyone(processes, own)
    by_loss = [one for one in everyone if not one.found.loss]
    fields: dict[str, Any] = {"grad_norm": repr(measured.grad_norm), "loss": repr(measured.loss)}
    if by_loss:
        return _in_forward(processes, by_loss, first_module(), fields)
    broken = {fqn for one in everyone for fqn in one.found.parameters}
    if not broken:
        return StepEvent("not_finite", "the loss is not finite, every gradient is", fields)
    place = {fqn: i for i, fqn in enumerate(order)}
    first = max(broken, key=lambda fqn: place[fqn])
    kept = any(one.found.own for one in everyone) or processes.replicas.size > 1
    guilty = [one for one in everyone if first in (one.found.own if kept else one.found.parameters)]
    text = f"not finite first in backward: gradient of {first} on {_named(guilty)}"
    if not guilty:
        text = f"not finite first in backward: gradient of {first}, in the sum over ranks alone"
    fields |= {"where": "backward", "parameter": first, "parameters": len(broken), **_who(guilty)}
    return StepEvent("not_finite", text, fields)


def _in_forward(
    processes: Processes, by_loss: Sequence[_Rank], module: str | None, fields: dict[str, Any]
) -> StepEvent:
    found = [one for one in _everyone(processes, module) if one.found is not None]
    if not found:
        text = f"loss not finite on {_named(by_loss)}; forward, run once more, is finite: a transient fault"
        return StepEvent("not_finite", text, fields | {"where": "forward", "module": None, **_who(by_loss)})
    # Stages run one after the other: what the first of them found is where it began.
    losses = {one.rank for one in by_loss}
    found = [one for one in found if one.rank in losses] or found
    first = found[0].found
    guilty = [one for one in found if one.found == first]
    text = f"not finite first in forward: output of {first} on {_named(guilty)}"
    return StepEvent("not_finite", text, fields | {"where": "forward", "module": first, **_who(guilty)})


@contextmanager
def watched_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Collect names of the modules whose output is not finite, in the order in which they return: inner ones
    before those around them."""
    names: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(torch.isfinite(x).all() for x in tensors if isinstance(x, Tensor)):
                names.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def compare_runs(
    processes: Processes,
    done: int,
    runs: tuple[Measured, Measured],
    own_sums: tuple[OwnSums, OwnSums],
) -> StepEvent:
    """Compare two runs of one step, bit by bit. Collective over all ranks.

    Returns:
        ``corruption_suspected`` with the ranks whose numbers differ, or ``reproduced``.
    """
    first, second = ([float(run.own_total).hex()] for run in runs)
    own, again = ([value.hex() for value in sums.values()] for sums in own_sums)
    # Backward ends with the last bucket: what differs earliest is nearest to the fault in backward.
    where = next((fqns[0] for fqns, a, b in zip(own_sums[0], own, again, strict=True) if a != b), None)
    found = "loss" if first != second else where and f"gradient of {where}"
    everyone = _everyone(processes, found)
    guilty = [one for one in everyone if one.found]
    totals = [(run.loss.hex(), run.grad_norm.hex()) for run in runs]
    fields = {
        "loss": [repr(run.loss) for run in runs],
        "grad_norm": [repr(run.grad_norm) for run in runs],
        **_who(guilty),
    }
    numbers = f"loss {runs[0].loss:.6g} then {runs[1].loss:.6g}, gradient norm {runs[0].grad_norm:.4g} then "
    numbers += f"{runs[1].grad_norm:.4g}"
    if guilty:
        text = (
            f"CORRUPTION SUSPECTED on {_named(guilty)}: step {done}, run twice from the same state, gave "
            f"other numbers there ({guilty[0].found}); {numbers}. The second result is used; "
            "watch that machine"
        )
        return StepEvent("corruption_suspected", text, {"what": guilty[0].found, **fields})
    if totals[0] != totals[1]:
        text = (
            f"CORRUPTION SUSPECTED in the reduction: step {done}, run twice, has the same numbers on every "
            f"rank, but not their sums; {numbers}. The second result is used; watch the network"
        )
        return StepEvent("corruption_suspected", text, {"what": "reduction", **fields})
    text = "run twice, the step gave the same bits on every rank: data or model are the cause"
    return StepEvent("reproduced", text, fields)
