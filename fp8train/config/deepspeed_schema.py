"""The ``deepspeed`` section: what DeepSpeed is told besides what follows from the other sections.

See :mod:`fp8train.config.schema` for how sections work, and :mod:`fp8train.deepspeed_engine.settings` for the
JSON that is made of it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fp8train.config.section import Section, contradiction

Place = Literal["none", "cpu", "nvme"]


class DeepSpeedConfig(Section):
    """DeepSpeed's part of a run; read with ``engine: deepspeed``."""

    config: str | None = None
    """A JSON file with more of DeepSpeed's settings, laid over those that follow from this file. One that
    both define is refused, whatever its value."""
    offload_param: Place = "none"
    """``parallel.zero: 3`` only: where parameters rest that no layer needs at the moment."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, for ``nvme`` here or in ``optimizer.offload``."""

    @model_validator(mode="after")
    def _needs_a_path(self) -> DeepSpeedConfig:
        if self.offload_param == "nvme" and self.nvme_path is None:
            raise contradiction(
                "deepspeed.offload_param: nvme needs a folder on a local disk; set deepspeed.nvme_path",
                "offload_param",
                "nvme_path",
            )
        return self
