"""CPU threads of a rank where ``run.threads`` does not say: ``OMP_NUM_THREADS``.

Launchers set it (``launch/torchrun.sh``, ``launch/slurm.sbatch``; torchrun itself sets 1 for several
processes), and torch follows it until someone sets threads. The run would, since it sets them; so it reads
the variable itself, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp8train.config.errors import ConfigError
from fp8train.config.limits import MAX_THREADS
from fp8train.config.nodes import Origin
from fp8train.config.scalars import shorten

VARIABLE = "OMP_NUM_THREADS"
FROM_ENVIRONMENT = Origin("environment", VARIABLE)


def threads_from_environment(environment: Mapping[str, str]) -> int | None:
    """``OMP_NUM_THREADS``; None where it is not set. Of a list (threads of nested levels) the first counts.

    Raises:
        ConfigError: it is not a positive number.
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return None
    first = text.split(",")[0].strip()
    if not (first.isascii() and first.isdigit() and len(first) < 10 and 0 < int(first) <= MAX_THREADS):
        raise ConfigError(
            f"{VARIABLE}={shorten(text)!r} is not a number of threads (1 to {MAX_THREADS}); unset it, or "
            "write run.threads=1, which it does not change"
        )
    return int(first)
