"""Which settings of an optimizer state's format mean something together.

One table for the configuration, which tells the user at once, and for the optimizer, which is also built
without one.
"""

from __future__ import annotations

SCALED = ("fp16_scaled", "e4m3", "e5m2")
FP8 = ("e4m3", "e5m2")
EXACT = ("fp32", "fp64", "bf16_remainder")
"""Formats that keep every FP32 value."""


def misfit(
    role: str, *, name: str, granularity: str, rounding: str, expand: bool, sqrt: bool
) -> tuple[str, str] | None:
    """The first setting that the format of ``role`` (``master``, ``exp_avg``, ``exp_avg_sq``) would ignore or
    cannot have: its field, and ``field: value [with format name]: what to write``; None if all fit."""
    refused = (
        (
            name == "bf16_remainder" and role != "master",
            "format",
            "bf16_remainder",
            "it pairs a weight with its missing bits; write fp32, which has the same size, or bf16",
        ),
        (
            granularity == "tensor" and name not in SCALED,
            "granularity",
            "tensor",
            f"{name} has no scale; leave it out or choose one of {', '.join(SCALED)}",
        ),
        (
            expand and not (name in FP8 and granularity == "block"),
            "expand",
            "true",
            "only FP8 blocks have a range to expand; write format: e4m3 or e5m2 with granularity: block",
        ),
        (
            sqrt and (role != "exp_avg_sq" or name in EXACT),
            "sqrt",
            "true",
            "it halves the exponents of a second moment in 8 or 16 bits; leave it out",
        ),
        (
            rounding == "stochastic" and name in EXACT,
            "rounding",
            "stochastic",
            f"{name} rounds nothing away; write nearest",
        ),
    )
    for wrong, field, value, remedy in refused:
        if wrong:
            beside = f" with format {name}" if field != "format" else ""
            return field, f"{field}: {value}{beside}: {remedy}"
    return None
