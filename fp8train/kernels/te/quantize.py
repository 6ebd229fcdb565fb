"""FP8 operands cast by Transformer Engine's quantisers.

A quantiser makes "row-wise" data, for a GEMM that contracts the last dimension, and "column-wise" data, for
one that contracts the first. The two fields of what :meth:`TeCaster.cast` returns are those, as operands of
ours: [M, K] either way, with scales as :mod:`fp8train.numerics.granularity` says::

    quantiser                       scales        column-wise data       its scales
    Float8Quantizer                 [1]           [K, M] (1)             [1]
    Float8CurrentScalingQuantizer   [1]           [K, M] (1)             [1]
    Float8BlockQuantizer, 1x128     [K/128, M']   [K, M]                 [M/128, K']
    the same, 128x128               [M/128, K/128']  [K, M]              [K/128, M/128']
    MXFP8Quantizer                  [M'', K/32']  [M, K]                 [M/32', K'']

M' is padded to 4, M'' to 128. (1) From compute capability 10.0 there is row-wise data alone, for both.

Which casts have a quantiser is in :func:`fp8train.precision.transformer_engine.mismatch`. Codes are the same
bits as ours, so shapes that a quantiser does not take (:func:`_takes`) are cast by us, and so are steps whose
casts are watched. Two things differ. An infinite source saturates where the scale is its own amax's: TE takes
a scale of 1 then and tells nobody, where our ``scale_inv`` becomes NaN; a NaN stays one. And a delayed scale
that is not there yet is looked for from the host, until it is: TE has no scale of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.padding import Operand
from fp8train.kernels.te import te
from fp8train.numerics.formats import dtype_of
from fp8train.numerics.scale import inverse_power_of_two
from fp8train.numerics.scale_state import ScaleSlot, record_amax
from fp8train.precision.operand_cast import QuantSpec

Both = tuple[Operand | None, Operand | None]
"""Row-wise and column-wise operand; None if not asked for."""

_SOURCES = (torch.bfloat16, torch.float16, torch.float32)


class TeCaster:
    """Casts operands; one for all linears of a model. Quantisers are made once for each kind of cast.

    Raises:
        ValueError: Transformer Engine cannot be imported.
    """

    def __init__(self) -> None:
        te("pytorch.tensor")
        self._quantisers: dict[tuple[QuantSpec, bool, bool], Any] = {}
        self._known: set[int] = set()
        """Addresses of delayed scales that were seen to be there."""

    def cast(
        self, x: Tensor, spec: QuantSpec, slot: ScaleSlot | None, *, rows: bool, columns: bool
    ) -> Both | None:
        """Cast a matrix for one or two GEMMs.

        Args:
            x: [M, K], all of it; any strides.
            spec: how; one that has a quantiser.
            slot: scale and running amax of a delayed cast.
            rows: whether it is wanted for a GEMM that contracts dimension 1.
            columns: likewise, dimension 0.

        Returns:
            The operands; None where others have to cast: a shape or type that the quantiser does not take, a
            delayed scale that is not there yet.
        """
        if not _takes(x, spec) or (slot is not None and not self._is_known(slot.scale)):
            return None
        x = x.detach().contiguous()
        quantiser = self._quantiser(spec, rows, columns, x.device)
        if spec.granularity == "tensor":
            return _of_tensor(quantiser, x, spec, slot, rows, columns)
        made = quantiser.quantize(x)
        read = _of_mx if spec.granularity == "mx_1x32" else _of_blocks
        return read(made, x, spec, rows, columns)

    def _is_known(self, scale: Tensor) -> bool:
        if scale.data_ptr() in self._known:
            return True
        known = bool(scale > 0)  # waits for the device, in the first steps alone
        if known:
            self._known.add(scale.data_ptr())
        return known

    def _quantiser(self, spec: QuantSpec, rows: bool, columns: bool, device: torch.device) -> Any:
        key = spec, rows, columns
        if key not in self._quantisers:
            self._quantisers[key] = quantiser(spec, rows=rows, columns=columns, device=device)
        return self._quantisers[key]


def quantiser(spec: QuantSpec, *, rows: bool, columns: bool, device: torch.device) -> Any:
    """TE's quantiser for a spec and these layouts. Those of one scale that is given hold numbers of 1 and 0,
    which each cast replaces."""
    classes, dtype = te("pytorch.tensor"), te("pytorch.constants").TE_DType[dtype_of(spec.format)]
    made: Any
    if spec.granularity == "mx_1x32":
        made = classes.MXFP8Quantizer(dtype, rowwise=rows, columnwise=columns)
    elif spec.granularity != "tensor":
        made = classes.Float8BlockQuantizer(
            dtype,
            rowwise=rows,
            columnwise=columns,
            amax_epsilon=0.0,
            force_pow_2_scales=spec.power_of_two,
            block_scaling_dim=2 if spec.granularity == "block_128x128" else 1,
        )
    elif spec.scale_source == "current":
        made = classes.Float8CurrentScalingQuantizer(
            dtype,
            device,
            rowwise=rows,
            columnwise=columns,
            force_pow_2_scales=spec.power_of_two,
            amax_epsilon=0.0,
        )
    else:
        scale = torch.ones(1, device=device)
        if spec.constant_exponent is not None:
            scale = torch.full_like(scale, 2.0**spec.constant_exponent)
        made = classes.Float8Quantizer(
            scale, torch.zeros(1, device=device), dtype, rowwise=rows, columnwise=columns
        )
    made.internal = True  # plain storages, without autograd
    return made


def _takes(x: Tensor, spec: QuantSpec) -> bool:
    """Whether a quantiser casts ``x`` like this: whole blocks each way, and sizes that need no padding."""
    multiple = {"mx_1x32": 32, "block_1x128": 128, "block_128x128": 128}.get(spec.granularity, 16)
    return x.dtype in _SOURCES and x.numel() > 0 and all(size % multiple == 0 for size in x.shape)


def _of_tensor(
    quantiser: Any, x: Tensor, spec: QuantSpec, slot: ScaleSlot | None, rows: bool, columns: bool
) -> Both:
    given = spec.scale_source != "current"
    if given:
        quantiser.amax = x.new_zeros(1, dtype=torch.float32)
        if slot is not None:
            quantiser.scale = slot.scale.view(1)
    made, dtype = quantiser.quantize(x), dtype_of(spec.format)
    scale_inv = made._scale_inv.view(())
    if given:
        amax = quantiser.amax.view(())
        scale = quantiser.scale.view(())
        # The inverse as ours: of a power of two exact, whoever divides.
        inverse = inverse_power_of_two(scale) if spec.power_of_two else scale_inv
        scale_inv = torch.where(torch.isfinite(amax), inverse, torch.nan)
        if slot is not None and slot.amax is not None:
            record_amax(amax, slot.amax)
    straight = (made._data.view(dtype), scale_inv) if rows or made._transpose is None else None
    if not columns:
        return straight, None
    back = straight if made._transpose is None else (made._transpose.view(dtype).t(), scale_inv)
    return straight if rows else None, back


def _of_blocks(made: Any, x: Tensor, spec: QuantSpec, rows: bool, columns: bool) -> Both:
    (m, k), dtype = x.shape, dtype_of(spec.format)
    square = spec.granularity == "block_128x128"
    straight = back = None
    if rows:
        scales = made._rowwise_scale_inv
        straight = made._rowwise_data.view(dtype), scales[:, : k // 128] if square else scales[:, :m].t()
    if columns:
        scales = made._columnwise_scale_inv
        codes = made._columnwise_data.view(dtype).t()
        back = codes, scales[:, : m // 128].t() if square else scales[:, :k]
    return straight, back


def _of_mx(made: Any, x: Tensor, spec: QuantSpec, rows: bool, columns: bool) -> Both:
    (m, k), dtype = x.shape, dtype_of(spec.format)
    straight = back = None
    if rows:
        straight = made._rowwise_data.view(dtype), _e8m0(made._rowwise_scale_inv[:m, : k // 32])
    if columns:
        back = made._columnwise_data.view(dtype), _e8m0(made._columnwise_scale_inv[: m // 32, :k])
    return straight, back


def _e8m0(exponents: Tensor) -> Tensor:
    """FP32 powers of two from bytes; 255 is NaN."""
    return exponents.contiguous().view(torch.float8_e8m0fnu).float()
