"""NVIDIA apex, called from here and nowhere else; optional, and imported at its first use.

apex is found by its extension modules, ``amp_C`` and ``fused_layer_norm_cuda``, never by its name: the
package ``apex`` on PyPI is another project. We call those modules themselves. Its Python classes around them
keep weights and states of their own, and ``multi_tensor_applier`` adds nothing but the chunk size.

Signatures are those of apex's sources of July 2026 (commit 6424da3, ``csrc/amp_C_frontend.cpp`` and
``csrc/layer_norm_cuda.cpp``), unchanged since September 2023. They were read; none has run on a GPU yet.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NEEDED = {
    "amp_C": ("multi_tensor_adam_capturable", "multi_tensor_l2norm", "multi_tensor_scale"),
    "fused_layer_norm_cuda": (
        *("forward", "forward_affine", "backward", "backward_affine"),
        *("rms_forward", "rms_forward_affine", "rms_backward", "rms_backward_affine"),
    ),
}


def apex(module: str) -> Any:
    """One of apex's extension modules, with the functions that we call.

    Raises:
        RuntimeError: it cannot be imported, or lacks one of them.
    """
    remedy = (
        "build NVIDIA's sources (github.com/NVIDIA/apex) with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or write auto "
        "where the section `kernels` says apex"
    )
    try:
        found = import_module(module)
    except Exception as error:  # another CUDA or torch shows as ImportError or OSError
        raise RuntimeError(
            f"NVIDIA apex: {module} cannot be imported ({type(error).__name__}: {error}); {remedy}"
        ) from error
    if lacking := [name for name in _NEEDED[module] if not hasattr(found, name)]:
        raise RuntimeError(f"NVIDIA apex: {module} has no {' and no '.join(lacking)}; {remedy}")
    return found
