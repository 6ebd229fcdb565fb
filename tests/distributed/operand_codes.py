"""FP8 codes that a step's GEMMs read, and how many differ from those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8train.comm.processes import Processes
from fp8train.config.world import accumulation_steps
from fp8train.layers import fp8_linear
from fp8train.models.param_spec import Shard
from fp8train.step.trainer import Trainer

Operands = list[tuple[Tensor, Tensor]]
"""Of one linear, a pair for each micro-batch: codes of x [T, K] and of grad_output [T, N], as bytes. T is a
multiple of 16, so that no operand has rows of padding."""


class Codes(NamedTuple):
    """Operand codes of one step, by linear."""

    weights: dict[str, Tensor]
    """[N, K], as the output GEMM reads them."""
    operands: dict[str, Operands]


class Changed(NamedTuple):
    """Codes of one rank that differ, and how many there are."""

    count: int
    of: int

    @property
    def share(self) -> float:
        """Their share."""
        return self.count / self.of if self.of else 0.0

    def plus(self, other: Changed) -> Changed:
        """Of both."""
        return Changed(self.count + other.count, self.of + other.of)


@contextmanager
def capture(trainer: Trainer) -> Iterator[Codes]:
    """Keep the operands of all weight-gradient GEMMs while it is open. They are the codes that the other two
    GEMMs read, unless a recipe has operands of its own for each GEMM."""
    linears = {name: linear for name, linear in trainer.model.linears().items() if linear.plan is not None}
    names, codes = {}, Codes({}, {name: [] for name in linears})
    for name, linear in linears.items():
        assert linear.sink_slot is not None
        names[linear.sink_slot.sink, int(linear.sink_slot.slot)] = name
        linear.quantize_weight()
        linear.await_weight()
        codes.weights[name] = _bytes(linear.fp8_codes(), linear.out_features, linear.in_features)
    original = fp8_linear.contribute_grad_weight_fp8

    def recorded(grad_output: Tensor, grad_scale: Tensor, x: Tensor, *rest: Any) -> None:
        name = names[rest[3], int(rest[2])]
        shape = linears[name].weight.shape
        codes.operands[name].append((x.view(torch.uint8)[:, : shape[1]], _columns(grad_output, shape[0])))
        original(grad_output, grad_scale, x, *rest)

    fp8_linear.contribute_grad_weight_fp8 = recorded
    try:
        yield codes
    finally:
        fp8_linear.contribute_grad_weight_fp8 = original


def _bytes(payload: Tensor, rows: int, columns: int) -> Tensor:
    return payload.view(torch.uint8)[:rows, :columns].clone()


def _columns(payload: Tensor, columns: int) -> Tensor:
    return payload.view(torch.uint8)[:, :columns]


def changed(
    got: Codes, expected: Codes, trainer: Trainer, processes: Processes
) -> dict[str, dict[str, Changed]]:
    """This rank's codes against its part of those of one process.

    Args:
        got: of this rank.
        expected: of one process that had all micro-batches (of one sequence each), in the same order.
        trainer: whose they are.
        processes: its place.

    Returns:
        ``{linear: {"w" | "x" | "grad_output": changed codes}}``.
    """
    found = {}
    micro_batches = accumulation_steps(trainer.config, processes.dp.size)
    for name, operands in got.operands.items():
        spec = trainer.model.specs[f"{name}.weight"]
        x, grad_output = Changed(0, 0), Changed(0, 0)
        theirs = _my_micro_batches(expected.operands[name], micro_batches, processes)
        for mine, whole in zip(operands, theirs, strict=True):
            x = x.plus(_compare(mine[0], _part(whole[0], spec.shard, 1, processes)))
            grad_output = grad_output.plus(_compare(mine[1], _part(whole[1], spec.shard, 0, processes)))
        weight = _compare(got.weights[name], spec.local(expected.weights[name]))
        found[name] = {"w": weight, "x": x, "grad_output": grad_output}
    return found


def _my_micro_batches(operands: Operands, micro_batches: int, processes: Processes) -> Operands:
    """Those of this rank's ``micro_batches``; ``exact`` runs the first batch twice."""
    each_pass = micro_batches * processes.dp.size
    first = processes.dp.rank * micro_batches
    return [
        operands[start + first + i]
        for start in range(0, len(operands), each_pass)
        for i in range(micro_batches)
    ]


def _part(codes: Tensor, shard: Shard | None, dim: int, processes: Processes) -> Tensor:
    """Rows of this rank's tokens, columns of its part of the weight if that is cut in ``dim``."""
    part = codes.chunk(processes.cp.size)[processes.cp.rank]
    return part if shard is None or shard.dim != dim else part.chunk(shard.count, dim=1)[shard.index]


def _compare(mine: Tensor, expected: Tensor) -> Changed:
    assert mine.shape == expected.shape, f"{tuple(mine.shape)} is no part of {tuple(expected.shape)}"
    return Changed(int((mine != expected).sum()), mine.numel())
