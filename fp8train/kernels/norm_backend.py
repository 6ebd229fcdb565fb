"""Which implementation computes RMSNorm and LayerNorm, chosen once when a model is built.

=========  ========================================================================================
norm       what runs
=========  ========================================================================================
auto       ours: fused with what stands around it (:mod:`fp8train.kernels.norms`) where a block runs as
           fused functions; torch's inside of compiled blocks; rows in blocks on CPUs
te         Transformer Engine's (:mod:`fp8train.kernels.te.norm`)
apex       NVIDIA apex's (:mod:`fp8train.kernels.apex.norm`)
=========  ========================================================================================

The norms of other packages are passes of their own: a block that uses them runs layer by layer, for its fused
functions cast to FP8, and add the residual stream, within the pass of a norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8train.kernels.package_kernels import NormFunction, RunsOn, on_cuda

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class NormBackend:
    """What computes norms on this device, and why.

    Attributes:
        name: as the configuration has it.
        reason: why.
        rms: RMSNorm; None leaves it to :mod:`fp8train.layers.norm`.
        layer: LayerNorm, likewise.
    """

    name: str
    reason: str
    rms: NormFunction | None = None
    layer: NormFunction | None = None

    @property
    def fuses(self) -> bool:
        """Whether norms may be one pass with what stands around them."""
        return self.name == "auto"

    def __str__(self) -> str:
        return f"{self.name} [{self.reason}]"


AUTO = NormBackend("auto", "ours, or torch's in compiled blocks")


def choose_norm_backend(
    device: torch.device, dtype: torch.dtype, *, wanted: str = "auto", runs_on: RunsOn = on_cuda
) -> NormBackend:
    """The backend for norms of ``dtype`` on ``device``; imports the package that is wanted.

    Args:
        device: where norms run.
        dtype: of activations and parameters.
        wanted: ``auto``, ``te`` or ``apex``.
        runs_on: where the kernels of packages run.

    Raises:
        ValueError: not on this device, or not in this type.
        RuntimeError: the package is not here or does not load.
    """
    if wanted == "auto":
        return AUTO
    if (refusal := runs_on(device)) is not None:
        raise ValueError(f"`norm`: {wanted} {refusal}; write `norm`=auto")
    if dtype not in _DTYPES:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"`norm`: {wanted} computes in bfloat16 and float32, not in {kind}; write `norm`=auto"
        )
    if device.type == "meta":
        return NormBackend(wanted, "meta device: shapes only")
    if wanted == "te":
        from fp8train.kernels.te.norm import norms
    else:
        from fp8train.kernels.apex.norm import norms
    rms, layer = norms()
    return NormBackend(wanted, "as the configuration says; no block runs as fused functions", rms, layer)
