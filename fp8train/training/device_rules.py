"""What only the device can tell to be wrong with a configuration for any device.

Known once a process has its device, and told before the run directory is touched.
"""

from __future__ import annotations

import torch

from fp8train.comm.fp8_all_reduce import check_native
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.kernels.multi_tensor import choose_multi_tensor
from fp8train.kernels.te.quantize import TeCaster
from fp8train.models.build import COMPUTE_DTYPES, attention_backend, norm_backend


def check_device(config: Config, device: torch.device) -> None:
    """Whether ``device`` can do what the configuration asks for.

    Raises:
        ConfigError: ``exact`` without what fixes its bits here, NCCL's FP8 sum where there is none, FP8 GEMMs
            on a GPU without them, attention by a kernel that is not here, CUDA graphs without CUDA, a
            package of kernels that does not load.
    """
    if config.run.cuda_graphs and device.type != "cuda":
        raise ConfigError(
            f"run.cuda_graphs: true is for CUDA devices, and this is a {device.type.upper()}; set "
            "run.cuda_graphs=false"
        )
    precision = config.precision
    try:
        if (quant := precision.gemm.value()) is not None:
            choose_gemm_backend(device, COMPUTE_DTYPES[precision.compute], quant, config.kernels.gemm)
            if config.kernels.quantize == "te":
                TeCaster()
        if precision.gradient.format != "high_precision":
            _check_gradients(config, device)
        attention_backend(config, device)
        norm_backend(config, device)
        choose_multi_tensor(device, key="optimizer", wanted=config.kernels.optimizer)
        choose_multi_tensor(device, key="multi_tensor", wanted=config.kernels.multi_tensor)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from None


def _check_gradients(config: Config, device: torch.device) -> None:
    fp8 = config.precision.gradient.fp8
    if fp8.sum == "native":
        check_native(device)
    if fp8.reduce != "exact":
        return
    if device.type == "cpu" and config.run.threads is None:
        raise ConfigError(
            "precision.gradient.fp8.reduce: exact gives the same bits on any number of ranks only at equal "
            "threads per rank; set run.threads, for example run.threads=1"
        )
    if device.type == "cuda" and not config.run.deterministic:
        raise ConfigError(
            "precision.gradient.fp8.reduce: exact needs kernels whose result does not depend on timing; "
            "set run.deterministic=true"
        )
