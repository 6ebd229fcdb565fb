"""What a cast did to a tensor, measured on the device without a host sync.

A *cast site* is (linear, operand). Every ``logging.cast_statistics_interval`` steps each site writes one row
of a flat FP32 tensor; the rows travel to the host once, when the step is logged. One log feeds every plot and
every guard.

Columns (fractions are of the elements that are not zero in the source, except ``zero``):

* ``amax``, ``rms`` of the source; ``log2_scale`` of the scale that multiplied it;
* ``zero``: share of exact zeros in the source;
* ``flushed``: non-zero values that became zero (underflow);
* ``saturated``: values whose scaled magnitude exceeded the format's maximum (overflow);
* ``snr_db``: signal-to-noise ratio ``10·log10(sum x² / sum (x - q)²)``; infinite where the cast was exact;
* ``kurtosis``: ``mean(x⁴) / mean(x²)²`` of the source, 3 for a normal distribution, 0 for zeros: outliers
show
  here long before they hurt (an early sign of divergence in FP8: arXiv 2505.20524).

A source that holds NaN or infinity has a NaN ``scale_inv``: ``log2_scale`` and ``snr_db`` are NaN, and the
row is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fp8train.numerics.cast import amax_of
from fp8train.numerics.formats import format_of
from fp8train.numerics.nvfp4 import LARGEST

FIELDS = ("amax", "rms", "log2_scale", "zero", "flushed", "saturated", "snr_db", "kurtosis")
_ZERO = FIELDS.index("zero")
_ULP_SLACK = 1 + 2.0**-20  # a free scale and its inverse are rounded: amax may land an FP32 ulp above max


def cast_statistics(x: Tensor, payload: Tensor, scale_inv: Tensor) -> Tensor:
    """Measure what a cast did to a tensor: one row of statistics, in the order of ``FIELDS``.

    Args:
        x: the source, any float dtype.
        payload: its FP8 cast, same shape; or the payload of a simulated NVFP4 cast, whose ``saturated`` are
            values beyond what the largest scale of a block and the tensor's hold: none.
        scale_inv: FP32 scalar, or broadcastable to x (block scales): ``log2_scale`` is then their mean.

    Returns:
        FP32 [len(FIELDS)], on x's device.
    """
    largest = format_of(payload.dtype).max if payload.element_size() == 1 else LARGEST
    source = x.detach().float()
    decoded = payload.float() * scale_inv
    magnitude = source.abs()
    nonzero = magnitude > 0
    count = nonzero.sum().clamp(min=1).float()
    signal = source.double().square().sum()
    noise = (source - decoded).double().square().sum()
    kurtosis = source.double().square().square().sum() * source.numel() / signal.square()
    kurtosis = torch.where(signal == 0, torch.zeros_like(kurtosis), kurtosis)
    return torch.stack(
        [
            amax_of(source),
            (signal / source.numel()).sqrt().float(),
            -torch.log2(scale_inv).mean(),
            (magnitude == 0).float().mean(),
            (nonzero & (decoded == 0)).sum().float() / count,
            (magnitude / scale_inv > largest * _ULP_SLACK).sum().float() / count,
            torch.where(noise == 0, torch.inf, 10 * torch.log10(signal / noise)).float(),
            kurtosis.float(),
        ]
    )


class CastRecorder:
    """Rows of statistics for a fixed list of cast sites.

    ``active`` is a plain attribute that the training loop switches on for sampled steps; layers test it in
    Python, so it costs nothing otherwise (and one extra graph under ``torch.compile``). With several
    micro-batches in a step the last one is kept.
    """

    def __init__(self, sites: Sequence[str], device: torch.device) -> None:
        """Args: ``sites``: unique names, e.g. ``layers.0.mlp.down/x``; ``device``: where the rows live."""
        self.sites = list(sites)
        self.active = False
        self._index = {site: i for i, site in enumerate(self.sites)}
        self.rows = torch.full((len(self.sites), len(FIELDS)), torch.nan, device=device)

    def row(self, site: str) -> Tensor:
        """The row of ``site``, FP32 [len(FIELDS)]: a view to write :func:`cast_statistics` into."""
        return self.rows[self._index[site]]

    def record(self, site: str, x: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        """Measure a cast and write the result into the row of ``site``; arguments as for
        :func:`cast_statistics`."""
        self.rows[self._index[site]].copy_(cast_statistics(x, payload, scale_inv))

    def forget(self, sites: Iterable[str]) -> None:
        """Make these sites as if they had never been recorded."""
        for site in sites:
            self.row(site).fill_(math.nan)

    def recorded(self) -> Tensor:
        """Which rows were written: bool [sites]."""
        return ~torch.isnan(self.rows[:, _ZERO])

    def collect(self, rows: Tensor | None = None) -> dict[str, dict[str, float]]:
        """Move the rows to the host (the only sync): ``{site: {field: value}}`` of the recorded sites.

        ``rows``: those of other processes too, which hold the other sites.
        """
        table = (self.rows if rows is None else rows).tolist()
        return {
            site: dict(zip(FIELDS, row, strict=True))
            for site, row in zip(self.sites, table, strict=True)
            if not math.isnan(row[_ZERO])  # a share of elements: never NaN in a recorded row
        }
