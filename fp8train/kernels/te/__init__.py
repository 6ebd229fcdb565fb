"""NVIDIA Transformer Engine, called from here and nowhere else; optional, and imported at its first use.

Written from its sources, 2.14 to 2.20, whose names and arguments ``tests/kernels/te`` reads again. None of it
has run on a GPU yet.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def te(module: str) -> Any:
    """``transformer_engine.{module}``, imported if it was not yet.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return import_module(f"transformer_engine.{module}")
    except (
        Exception
    ) as error:  # a missing library shows as ImportError, OSError, RuntimeError, AssertionError
        raise ValueError(
            f"Transformer Engine cannot be imported ({type(error).__name__}: {error}); install it with "
            "`pip install --no-build-isolation 'transformer-engine[pytorch]>=2.14,<3'`, or write auto where "
            "the section `kernels` says te or te_native"
        ) from error
