"""Whether weight decay survives a master weight that is rounded to nearest.

A step multiplies a weight by ``1 - d``. A format with t bits after the leading one has its neighbours at
``2^-t / f`` of a weight, f in [1, 2) its significand, so half a unit in the last place is between
``2^-(t+2)`` and ``2^-(t+1)`` of it. A decay below the lower end moves no weight by itself, one below the
upper end moves only those with a large enough significand (``f > 2^-(t+1) / d``), and those by a whole unit.

Only by itself: updates of several units act as a dither, under which decay survives on average. So what is
lost is the decay of weights that are large against their updates, and of those whose gradients have faded.
Stochastic rounding keeps it everywhere. FP8-LM rounds FP16 masters to nearest (t = 10), at rates of 3e-4 and
λ = 0.1: d is 3e-5, the bound 2.4e-4.
"""

from __future__ import annotations

from collections.abc import Iterable

from fp8train.precision.state_formats import StateFormat

_MANTISSA_BITS = {"bf16": 7, "fp16_scaled": 10, "e4m3": 3, "e5m2": 2}


def half_units(fmt: StateFormat) -> tuple[float, float] | None:
    """Smallest and largest half unit in the last place, as shares of a (normal) number; None of a format that
    rounds no decay away: exact, stochastic, or expanded, whose spacing is another."""
    if fmt.is_exact or fmt.rounding == "stochastic" or fmt.expand:
        return None
    bits = _MANTISSA_BITS[fmt.format]
    return 2.0 ** -(bits + 2), 2.0 ** -(bits + 1)


def explain_lost_decay(fmt: StateFormat, decays: Iterable[float]) -> str | None:
    """What happens to the decay of master weights that are rounded to nearest, if it is lost.

    Args:
        fmt: of master weights.
        decays: shares of a weight that a step at the peak rate removes, of the weights that have this format.
    """
    limits, positive = half_units(fmt), [decay for decay in decays if decay > 0]
    if limits is None or not positive or min(positive) >= limits[1]:
        return None
    smallest, largest = min(positive), max(positive)
    shares = f"{smallest:.2g}" if smallest == largest else f"{smallest:.2g} to {largest:.2g}"
    if largest < limits[0]:
        verdict, below = "moves no weight by itself", limits[0]
    else:
        verdict, below = "moves only some weights by itself", limits[1]
    return (
        f"weight decay removes {shares} of a weight at a step with the peak rate, which {verdict}, as half a "
        f"unit in the last place of {fmt.format} is {limits[0]:.2g} to {limits[1]:.2g} of it (needed: "
        f"{below:.2g}); it acts only together with larger updates"
    )
