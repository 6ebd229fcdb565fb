"""Where the kernels of other packages run."""

from __future__ import annotations

from collections.abc import Callable

import torch

RunsOn = Callable[[torch.device], str | None]
"""Why such kernels do not run on a device, as the end of a sentence that begins with their name; None if they
do."""


def on_cuda(device: torch.device) -> str | None:
    """Transformer Engine's and apex's kernels: on CUDA devices. The meta device stands for one."""
    if device.type in ("cuda", "meta"):
        return None
    return f"is for CUDA devices, and this is a {device.type.upper()}"
