"""Which implementation multiplies FP8 operands on a device, chosen once when a model is built, and why.

The reason is told in a run's header: which GEMMs have no kernel there, what shapes theirs take, and what they
are multiplied by instead (:mod:`fp8train.kernels.gemm`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fp8train.config.kernel_schema import GemmKernel
from fp8train.kernels.scaling import cuda_version, native_pair, shape_rule
from fp8train.kernels.te import gemm as te_gemm
from fp8train.kernels.te import te
from fp8train.numerics.formats import dtype_of
from fp8train.precision.linear_gemms import GEMMS, LinearQuant
from fp8train.precision.scale_blocks import Granularity
from fp8train.precision.transformer_engine import NativeRecipe, native_recipe


@dataclass(frozen=True)
class GemmBackend:
    """Which implementation multiplies FP8 operands on this device, and why it was chosen."""

    name: str
    reason: str


def choose_gemm_backend(
    device: torch.device,
    compute_dtype: torch.dtype,
    quant: LinearQuant | None = None,
    wanted: GemmKernel = "auto",
) -> GemmBackend:
    """The implementation for ``device``, chosen once when a model is built.

    Args:
        device: where GEMMs run.
        compute_dtype: of their results.
        quant: of the operands, for the reason to tell which GEMMs have no kernel; None: one scale per tensor.
        wanted: ``auto``, or who is to multiply.

    Raises:
        ValueError: a CUDA device without FP8 tensor cores (compute capability below 8.9) was asked for BF16
            FP8 training, or Transformer Engine for what it cannot do here.
    """
    nvfp4 = quant is not None and quant.is_nvfp4
    if wanted != "auto":
        _check_te(device, compute_dtype, wanted, nvfp4=nvfp4)
    if wanted == "te_native":
        return _native_backend(device, LinearQuant() if quant is None else quant)
    if nvfp4:
        return GemmBackend(
            "simulation",
            "NVFP4 simulation: operands rounded to FP4 values, held in the compute dtype, multiplied in high "
            "precision; no FP4 hardware or storage",
        )
    if device.type == "cpu":
        return GemmBackend("decode", "CPU: FP8 operands decoded, multiplied in the compute dtype")
    if compute_dtype == torch.float64:
        return GemmBackend(
            "decode", "FP64 results exist only for checking: FP8 operands decoded, multiplied in FP64"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            "FP8 GEMMs need compute capability 8.9 or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; "
            "write `fp8`=false or `device`=cpu"
        )
    if wanted == "te":
        return _te_backend(device, LinearQuant() if quant is None else quant, compute_dtype)
    reason = f"FP8 tensor cores, {_device(device)}"
    if quant is not None:
        reason += _without_kernel(quant, capability, cuda_version(), compute_dtype)
    return GemmBackend("scaled_mm", reason)


def _device(device: torch.device) -> str:
    return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


def _check_te(device: torch.device, dtype: torch.dtype, wanted: GemmKernel, *, nvfp4: bool) -> None:
    """What of a device or type rules Transformer Engine out, whatever the operands."""
    if device.type != "cuda":
        problem = f"needs an NVIDIA GPU, and this is a {device.type.upper()}"
    elif dtype == torch.float64:
        problem = "multiplies to BF16 or FP32, and the compute type is FP64"
    elif nvfp4 and wanted == "te":
        problem = (
            "cannot multiply what the simulation of NVFP4 makes: values in the compute type, not packed FP4 "
            "codes and their scales; te_native has Transformer Engine's own NVFP4"
        )
    else:
        return
    raise ValueError(f"`gemm`: {wanted} {problem}; set `gemm`=auto")


def _native_backend(device: torch.device, quant: LinearQuant) -> GemmBackend:
    """Transformer Engine's own linears.

    Raises:
        ValueError: it has no recipe for this, the device is too old for it, or it cannot be imported.
    """
    recipe, capability = native_recipe(quant), torch.cuda.get_device_capability(device)
    problem = recipe if isinstance(recipe, str) else recipe.unfit(capability)
    if problem is not None:
        raise ValueError(f"`gemm`: te_native: {problem}; set `gemm`=auto")
    assert isinstance(recipe, NativeRecipe)
    te("pytorch")  # a package that is there and broken is told now
    return GemmBackend("te_native", f"Transformer Engine's own linears, {recipe.name}, {_device(device)}")


def _te_backend(device: torch.device, quant: LinearQuant, out_dtype: torch.dtype) -> GemmBackend:
    """Transformer Engine's GEMMs, and what the reason says of those that go to torch's scaled matmul.

    Raises:
        ValueError: it multiplies none of them, or cannot be imported.
    """
    capability, cuda, specs = torch.cuda.get_device_capability(device), cuda_version(), quant.operands()

    def known(a: str, b: str) -> bool:
        kinds = specs[a].granularity, specs[b].granularity
        pow2 = specs[a].power_of_two and specs[b].power_of_two
        return te_gemm.multiplies(kinds, capability, cuda, out_dtype, power_of_two=pow2)

    taken, left = _sorted_gemms(quant, known)
    names = ", ".join(f"{gemm} ({a} x {b})" for gemm, (a, b) in left.items())
    if not taken:
        raise ValueError(
            f"`gemm`: te has no kernel for {names}, with results in {out_dtype}, {_device(device)} and "
            f"CUDA {cuda[0]}.{cuda[1]}; set `gemm`=auto, or a recipe with scales of tensors or blocks"
        )
    reason = f"Transformer Engine's GEMM, {_device(device)}"
    if rule := te_gemm.shape_rule(taken.values()):
        reason += f"; of {', '.join(taken)} where {rule}"
    if left:
        reason += f"; not for {names}: torch's scaled matmul"
        reason += _without_kernel(quant, capability, cuda, out_dtype, only=tuple(left))
    te("pytorch.cpp_extensions")  # as above
    return GemmBackend("te", reason)


def _without_kernel(
    quant: LinearQuant,
    capability: tuple[int, int],
    cuda: tuple[int, int],
    out_dtype: torch.dtype,
    only: tuple[str, ...] = tuple(GEMMS),
) -> str:
    """What the reason says of those GEMMs that have no kernel, and of shapes that theirs do not take."""
    sorted_gemms = gemms_by_kernel(quant, capability, cuda, out_dtype)
    native, decoded = ({gemm: kinds[gemm] for gemm in only if gemm in kinds} for kinds in sorted_gemms)
    said = ""
    if decoded:
        names = ", ".join(f"{gemm} ({a} x {b})" for gemm, (a, b) in decoded.items())
        results = "" if out_dtype == torch.bfloat16 else f" with results in {out_dtype}"
        said = f"; no kernel here for {names}{results}: operands decoded, multiplied in high precision"
    if rule := shape_rule(native.values()):
        said += f"; kernels of {', '.join(native)} take {rule}: operands of other shapes decoded, likewise"
    return said


GranularityPairs = dict[str, tuple[Granularity, Granularity]]
"""What shares a scale in operands A and B of GEMMs, by their names."""


def gemms_by_kernel(
    quant: LinearQuant, capability: tuple[int, int], cuda: tuple[int, int], out_dtype: torch.dtype
) -> tuple[GranularityPairs, GranularityPairs]:
    """Sort a linear's GEMMs in FP8 into those that torch has a kernel for on a device, and the others.

    Args:
        quant: of the operands.
        capability: of the device.
        cuda: version that torch was built with.
        out_dtype: of the products.
    """
    specs = quant.operands()

    def known(a: str, b: str) -> bool:
        kinds = specs[a].granularity, specs[b].granularity
        return native_pair(*kinds, capability, cuda, out_dtype, dtype_of(specs[b].format))

    return _sorted_gemms(quant, known)


def _sorted_gemms(
    quant: LinearQuant, known: Callable[[str, str], bool]
) -> tuple[GranularityPairs, GranularityPairs]:
    specs = quant.operands()
    found: tuple[GranularityPairs, GranularityPairs] = {}, {}
    for gemm, (a, b) in GEMMS.items():
        if quant.in_fp8(gemm):
            found[not known(a, b)][gemm] = (specs[a].granularity, specs[b].granularity)
    return found
