"""Where weight gradients go instead of ``.grad``: the protocol between layers and the gradient store.

Linears hand their weight gradient over through a custom operator (a Python side effect inside an autograd
function breaks full-graph compilation; an operator that mutates a buffer does not). The operator's arguments
are tensors and numbers, so it finds the sink by a number; ``register_sink`` hands those out and keeps only
weak references.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class GradSink(Protocol):
    """Receives the weight gradients of linears; the gradient store is one."""

    def contribute(self, slot: int, compute: Callable[[], Tensor]) -> None:
        """Take one contribution to the parameter in ``slot``.

        Args:
            slot: the parameter's index in the sink.
            compute: multiplies and returns the contribution, of the parameter's local shape. The sink decides
                when to call it (a zero-bubble pipeline defers it) and must call it once.
        """
        ...


_next_id = itertools.count(1)
_sinks: weakref.WeakValueDictionary[int, GradSink] = weakref.WeakValueDictionary()


def register_sink(sink: GradSink) -> int:
    """Register ``sink`` and return the number by which operators find it for as long as it lives."""
    number = next(_next_id)
    _sinks[number] = sink
    return number


def find_sink(number: int) -> GradSink:
    """The sink registered under ``number``."""
    assert number in _sinks, f"gradient sink {number} is gone; its gradient store was deleted before backward"
    return _sinks[number]
