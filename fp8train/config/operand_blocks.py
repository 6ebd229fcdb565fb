"""Whether a layout cuts operands of FP8 GEMMs inside a scale block: arithmetic on a validated configuration.

With ``precision.gemm`` an operand may have scales for blocks of B elements along a dimension. A block must
lie on one rank, at the place where one process has it; otherwise the same model would have other scales on
another layout. What is cut (:mod:`fp8train.layers.wire`):

* outputs of column-parallel linears (query/key/value, MLP up) by tp: columns of grad_output, rows of w;
* inputs of row-parallel linears (attention output, MLP down) by tp: columns of x and of w;
* tokens of x and grad_output, by cp, and by tp where their codes are gathered (``precision.traffic``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fp8train.config.all_sections import AllSections
from fp8train.precision.scale_blocks import OPERAND_BLOCK


class CutBlock(NamedTuple):
    """A cut that goes through a block.

    Attributes:
        operand: its key in ``precision.gemm``.
        block: elements of a block.
        what: the dimension that is cut, as a formula of keys.
        size: of that dimension.
        parts: ranks that have one part each.
        keys: to change.
    """

    operand: str
    block: int
    what: str
    size: int
    parts: int
    keys: tuple[str, ...]


_STORED = {
    "output.x": ("tokens", "inputs", 1),
    "output.w": ("outputs", "inputs", 1),
    "grad_input.grad_output": ("tokens", "outputs", 1),
    "grad_input.w": ("outputs", "inputs", 0),
    "grad_weight.grad_output": ("tokens", "outputs", 0),
    "grad_weight.x": ("tokens", "inputs", 0),
}
"""What the rows and the columns of each operand use are as it is stored, and which the GEMM contracts."""


def cut_blocks(config: AllSections) -> Iterator[CutBlock]:
    """All cuts through blocks, the operands in the order of the GEMMs."""
    quant = config.precision.gemm.value()
    for use, spec in ({} if quant is None else quant.quantised()).items():
        block = OPERAND_BLOCK.get(spec.granularity)
        if block is None:
            continue
        rows, columns, contracted = _STORED[use]
        blocked = (columns if contracted else rows,) if spec.directed else (rows, columns)
        for dim in blocked:
            for what, size, parts, keys in _cuts(config, use, dim):
                if parts > 1 and size % parts == 0 and size // parts % block:
                    yield CutBlock(use, block, what, size, parts, keys)


def _cuts(config: AllSections, operand: str, dim: str) -> list[tuple[str, int, int, tuple[str, ...]]]:
    """(formula, size, parts, keys) of everything that this dimension of an operand is, in some linear."""
    model, parallel, traffic = config.model, config.parallel, config.precision.traffic
    heads = ("model.num_heads * model.head_dim", model.num_heads * model.head_dim)
    if dim == "tokens":
        in_codes = traffic.activations if operand.endswith("x") else traffic.grad_output
        by_tp = in_codes == "fp8" and parallel.tp > 1
        keys = ("data.seq_length", *(("parallel.cp",) if parallel.cp > 1 else ()))
        parts = parallel.cp * (parallel.tp if by_tp else 1)
        return [
            ("data.seq_length", config.data.seq_length, parts, keys + (("parallel.tp",) if by_tp else ()))
        ]
    if dim == "inputs":
        sizes = [heads, ("model.ffn_hidden_size", model.ffn_hidden_size)]
    else:
        all_heads = model.num_heads + 2 * model.num_kv_heads
        gated = 2 if model.activation == "swiglu" else 1
        sizes = [
            ("(num_heads + 2 * num_kv_heads) * head_dim", all_heads * model.head_dim),
            (f"{gated} * model.ffn_hidden_size", gated * model.ffn_hidden_size),
        ]
    return [(what, size, parallel.tp, ("parallel.tp",)) for what, size in sizes]
