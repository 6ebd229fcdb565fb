"""DeepSpeed's engine with the ZeRO optimizers that our formats need. The one module that imports DeepSpeed at
its top: a trainer imports it when it is made."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn


class Engine(DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine; where it has two optimizers for one stage, always that of the other stages.

    With ZeRO-1, BF16 weights and gradients added up in FP32 DeepSpeed has an optimizer of its own, which
    reduces after backward and knows no skipped steps.
    """

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        return self._configure_zero_optimizer(optimizer)


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Engine:
    """What ``deepspeed.initialize`` does for such an engine, in the process group that there is.

    Args:
        model: whole, on its device; DeepSpeed takes over its parameters.
        optimizer: over them.
        settings: from :func:`fp8train.deepspeed_engine.settings.deepspeed_json`.
    """
    comm.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)
    return Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        config=settings,
        config_class=DeepSpeedConfig(settings, None),
        dist_init_required=False,
    )
