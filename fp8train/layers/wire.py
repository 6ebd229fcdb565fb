"""What a linear sends to the other tensor-parallel ranks, and when.

Column-parallel: each rank has some of the outputs, ``w [N/tp, K]``. It needs whole sequences as input, and
its input gradients are partial sums. Row-parallel: each rank has some of the inputs, ``w [N, K/tp]``; its
outputs are partial sums, and it needs whole sequences of output gradients. The sequence is cut everywhere
else (:mod:`fp8train.comm.sequence_parallel`)::

                 forward                            backward
    column       gather x                           gather x again, scatter-sum grad_input
    row          scatter-sum output                 gather grad_output

What is gathered in FP8 is the operand that the GEMM reads: its scales come from amaxes over all ranks that
hold parts of what shares a scale, so nothing is lost by sending codes. Scales of tokens travel with them.
Backward gathers the input again instead of keeping the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fp8train.comm.sequence_parallel import Agreement, TensorParallel
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import TWO_LEVELS

Kind = Literal["none", "column", "row"]
OperandName = Literal["x", "w", "grad_output"]


def _no_wait(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x


@dataclass(frozen=True)
class Wire:
    """What one linear sends to the other tensor-parallel ranks; ``kind: none`` sends nothing.

    Attributes:
        kind: how the weight is cut.
        parallel: among whom; None if alone.
    """

    kind: Kind = "none"
    parallel: TensorParallel | None = None

    @property
    def gathers_input(self) -> bool:
        """Whether the input arrives in parts of sequences, to be gathered."""
        return self.kind == "column"

    @property
    def gathers_grad_output(self) -> bool:
        """Whether output gradients arrive in parts of sequences, to be gathered."""
        return self.kind == "row"

    @property
    def input_in_fp8(self) -> bool:
        """Whether FP8 operands of the input are gathered, rather than the input."""
        return self.parallel is not None and self.gathers_input and self.parallel.traffic.activations

    @property
    def grad_output_in_fp8(self) -> bool:
        """Whether FP8 operands of the output gradient are gathered, rather than the gradient."""
        return self.parallel is not None and self.gathers_grad_output and self.parallel.traffic.grad_output

    def agreement(self, operand: OperandName, spec: QuantSpec, contracted: int) -> Agreement | None:
        """With whom to agree on the scales of an operand: the ranks that hold other parts of what shares a
        scale, and no others.

        Args:
            operand: which one; the part of it that is quantised here.
            spec: names what shares a scale.
            contracted: dimension of the operand that the GEMM contracts.

        Returns:
            None if nothing that shares a scale is cut. Blocks never are
            (:func:`fp8train.config.layout.layout_problems`).
        """
        of_tensor = spec.granularity == "tensor" or spec.granularity in TWO_LEVELS
        if self.parallel is None or not (of_tensor or spec.granularity == "row"):
            return None
        cuts = self._cuts(operand)
        along = cuts if of_tensor else (cuts[contracted],)
        return self.parallel.agreement(tp="tp" in "".join(along), cp="cp" in "".join(along))

    def _cuts(self, operand: OperandName) -> tuple[str, str]:
        """Which ranks hold other rows and other columns of an operand where it is quantised. Tokens are
        gathered before that, over tensor-parallel ranks, unless it is codes that are gathered."""
        if operand == "w":
            return "tp" if self.kind == "column" else "", "tp" if self.kind == "row" else ""
        if operand == "x":
            return "tp+cp" if self.input_in_fp8 else "cp", "tp" if self.kind == "row" else ""
        return "tp+cp" if self.grad_output_in_fp8 else "cp", "tp" if self.kind == "column" else ""

    def gather_input(self, x: Tensor, batch: int) -> Callable[[], Tensor]:
        """Start to gather the input of a column-parallel linear: [batch · S/tp, K] -> [batch · S, K]; others
        have nothing to do."""
        if not self.gathers_input:
            return _no_wait(x)
        assert self.parallel is not None
        return self.parallel.gather(x, batch=batch, purpose="tp_input")

    def gather_grad_output(self, grad_output: Tensor, batch: int) -> Callable[[], Tensor]:
        """Start to gather the output gradient of a row-parallel linear: [batch · S/tp, N] -> [batch · S, N];
        others have nothing to do."""
        if not self.gathers_grad_output:
            return _no_wait(grad_output)
        assert self.parallel is not None
        return self.parallel.gather(grad_output, batch=batch, purpose="tp_grad_output")

    def scatter_output(self, output: Tensor, batch: int, *, fp8: bool) -> Callable[[], Tensor]:
        """Start to add and scatter the output of a row-parallel linear: partial sums [batch · S, N] -> [batch
        · S/tp, N]; others have nothing to do. ``fp8``: the linear may send FP8 (if traffic says so)."""
        if self.kind != "row":
            return _no_wait(output)
        assert self.parallel is not None
        fp8 = fp8 and self.parallel.traffic.output
        return self.parallel.scatter_sum(output, batch=batch, fp8=fp8, purpose="tp_output")

    def scatter_grad_input(self, grad_input: Tensor, batch: int, *, fp8: bool) -> Callable[[], Tensor]:
        """Start to add and scatter the input gradient of a column-parallel linear: partial sums [batch · S,
        K] -> [batch · S/tp, K]; others have nothing to do. ``fp8`` as for :meth:`scatter_output`."""
        if self.kind != "column":
            return _no_wait(grad_input)
        assert self.parallel is not None
        fp8 = fp8 and self.parallel.traffic.grad_input
        return self.parallel.scatter_sum(grad_input, batch=batch, fp8=fp8, purpose="tp_grad_input")


UNSPLIT = Wire()


def wire(kind: Kind, parallel: TensorParallel | None) -> Wire:
    """The wire of a linear that is cut this way where there is tensor parallelism. Without it there may still
    be context-parallel ranks to agree with on amaxes."""
    if parallel is None:
        return UNSPLIT
    return Wire(kind if parallel.size > 1 else "none", parallel)
