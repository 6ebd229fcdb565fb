"""Matrices of values that a GPU computes tile by tile, wherever they are wanted: a formula, three operations.

With one scale per tensor a cast needs the amax of all values before it casts the first. Of a formula that
only reads memory, computing the values twice moves fewer bytes than writing and reading them between::

    amax     reads the inputs, leaves partials
    cast     reads the inputs again, computes the same values, writes codes in one or both layouts
    forward  writes the values themselves, where nothing is cast with one scale per tensor
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.kernels.operands import (
    CastOperand,
    CastRule,
    cast_with_partials,
    count_of_partials,
    empty_operand,
)
from fp8train.numerics.cast import amax_of

_CAST_ARGUMENTS = 8


def _cast_arguments(
    partials: Tensor,
    delayed: Tensor | None,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    constant_exponent: int | None,
    straight: bool,
    turned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a cast is told after the inputs of its formula; see :class:`CastOperand` for what it returns."""
    raise NotImplementedError  # a signature only


def _named(function: Callable[..., Any], name: str, signature: inspect.Signature) -> Callable[..., Any]:
    function.__name__ = name
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


class TiledValues:
    """The operations ``NAME_forward``, ``NAME_amax`` and ``NAME_cast`` of a formula called ``NAME``.

    Attributes:
        values: plain torch: from the inputs to a matrix.
        operations: the three, as above.
    """

    def __init__(
        self,
        values: Callable[..., Tensor],
        *,
        shape: Callable[..., tuple[int, int]],
        launchers: str,
        forward: str | None = None,
    ) -> None:
        """Declare the three operations.

        Args:
            values: annotated as an operation's reference; its first input has the dtype of the result.
            shape: of the result, from the same inputs.
            launchers: module that has them, ``NAME_forward`` and so on, from
                :func:`fp8train.kernels.gpu.elementwise.launchers`.
            forward: another name for ``NAME_forward``.
        """
        self.values = values
        name = values.__name__.lstrip("_")
        inputs = inspect.signature(values, eval_str=True)
        cast = inspect.signature(_cast_arguments, eval_str=True)
        joined = [*inputs.parameters.values(), *cast.parameters.values()]
        cast = cast.replace(parameters=joined)

        def fake_forward(*args: Any) -> Tensor:
            return args[0].new_empty(shape(*args))  # type: ignore[no-any-return]

        def amax_reference(*args: Any) -> Tensor:
            return amax_of(values(*args)).view(1)

        def fake_amax(*args: Any) -> Tensor:
            rows, columns = shape(*args)
            count = count_of_partials(rows * columns)
            return args[0].new_empty(count, dtype=torch.float32)  # type: ignore[no-any-return]

        def cast_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            own, (partials, delayed, *rule, straight, turned) = cut(args)
            return cast_with_partials(values(*own), partials, delayed, CastRule(*rule), straight, turned)

        def fake_cast(*args: Any) -> CastOperand:
            own, (_, _, *rule, straight, turned) = cut(args)
            return empty_operand(args[0], shape(*own), CastRule(*rule), straight, turned)

        def cost(args: tuple[Any, ...], out: Any) -> Cost:
            written = nbytes(out) if isinstance(out, Tensor) else nbytes(*out)
            return Cost(1, nbytes(*(x for x in args if isinstance(x, Tensor))), written)

        def declare(reference: Callable[..., Any], fake: Callable[..., Any], kind: str) -> FusedOp:
            return FusedOp(reference, launcher=f"{launchers}:{name}_{kind}", fake=fake, cost=cost)

        plain = _named(lambda *args: values(*args), forward or f"{name}_forward", inputs)
        amax = _named(amax_reference, f"{name}_amax", inputs)
        self.operations = (
            declare(plain, fake_forward, "forward"),
            declare(amax, fake_amax, "amax"),
            declare(_named(cast_reference, f"{name}_cast", cast), fake_cast, "cast"),
        )

    def forward(self, *inputs: Any) -> Tensor:
        """The values, contiguous, in the first input's dtype."""
        result: Tensor = self.operations[0](*inputs)
        return result

    def amax(self, *inputs: Any) -> Tensor:
        """FP32 [1 to 1024], whose largest magnitude is that of the values."""
        result: Tensor = self.operations[1](*inputs)
        return result

    def cast(
        self,
        *inputs: Any,
        partials: Tensor,
        rule: CastRule,
        delayed: Tensor | None = None,
        straight: bool = True,
        turned: bool = False,
    ) -> CastOperand:
        """The values as an operand of GEMMs; :func:`~fp8train.kernels.operands.cast_operand` explains."""
        return CastOperand(*self.operations[2](*inputs, partials, delayed, *rule, straight, turned))


def cut(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The inputs of the formula, and what the cast is told."""
    return args[:-_CAST_ARGUMENTS], args[-_CAST_ARGUMENTS:]
