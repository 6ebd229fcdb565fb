"""The ``kernels`` section: who computes what, where several could.

See :mod:`fp8train.config.schema` for how sections work, and :mod:`fp8train.extensions.catalogue` for what the
packages behind the names must be.
"""

from __future__ import annotations

from typing import Literal

from fp8train.config.section import Section

GemmKernel = Literal["auto", "te", "te_native"]
QuantizeKernel = Literal["auto", "te"]
AttentionKernel = Literal["auto", "flash3", "cudnn", "flash2", "math", "te"]
NormKernel = Literal["auto", "te", "apex"]
OptimizerKernel = Literal["auto", "apex"]
MultiTensorKernel = Literal["auto", "apex"]


class KernelsConfig(Section):
    """Whose kernels compute an operation. ``auto``: torch's and our own; other names ask for a package beside
    this one, and are honoured or refused."""

    gemm: GemmKernel = "auto"
    """FP8 products. ``te``: Transformer Engine's GEMM on our operands. ``te_native``: its own Linear under
    its autocast, the baseline to compare with; gradients and weights are then in high precision."""
    quantize: QuantizeKernel = "auto"
    """FP8 casts of operands. ``te``: Transformer Engine's quantisers, where recipes mean the same."""
    attention: AttentionKernel = "auto"
    """What computes attention: FlashAttention 3 (compute capability 9.0, package ``flash_attn_3``), cuDNN,
    which is not deterministic, FlashAttention 2, plain matrix products, or Transformer Engine. ``auto`` takes
    the first of the first four that the device has. On a CPU: ``auto`` or ``math``."""
    norm: NormKernel = "auto"
    """RMSNorm and LayerNorm: Transformer Engine's, or NVIDIA apex's. They replace our fused blocks, where
    norms are one pass with casts and sums."""
    optimizer: OptimizerKernel = "auto"
    """The update of parameters with FP32 states. ``apex``: NVIDIA apex's FusedAdam. FP8 states are updated by
    our own kernel either way."""
    multi_tensor: MultiTensorKernel = "auto"
    """Norm of all gradients. ``apex``: its multi-tensor kernels, in FP32."""
