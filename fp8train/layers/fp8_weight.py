"""The FP8 copies of a linear's weight, made once per optimizer step.

Three ways to come by them:

* :class:`CachedFp8Weight`: the layer holds its weight in the compute dtype and casts it when it changed.
* :class:`ResidentFp8Weight`: the layer holds nothing but the FP8 copies. The optimizer writes them from its
  master weights, piece by piece (it is a ``fp8train.optim.weight_target.WeightTarget``), or hands over the
  stored master for the next forward to cast. That saves the 2 bytes per parameter of a BF16 weight and one
  rounding: the operand is the master rounded to FP8, not the master rounded to BF16 and then to FP8.
* :class:`LoadedFp8Weight`: a trained weight in a model without backward: one copy, cast once.

Either way there are at most two copies: the operand of the output GEMM, and another for grad_input where
``keep_w: second_copy`` asks for it. Copies are padded with zeros to multiples of 16.

A delayed scale of a weight is used when the weight is cast and is told the weight's amax by every training
forward that uses it (:meth:`Fp8Weight.record_amax`), so it does not matter whether a training step or an
evaluation came across the new weight first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.kernels.fused_op import fuses
from fp8train.kernels.matmul import cpu_multiplies_bf16
from fp8train.kernels.operands import CastRule, turn_codes
from fp8train.kernels.padding import Operand, aligned
from fp8train.kernels.stored_weight import StoredWeight, cast_stored
from fp8train.layers.fp8_operand import Caster, cropped, quantize_kept, quantize_operand
from fp8train.layers.wire import UNSPLIT, Wire
from fp8train.numerics.cast import amax_of, cast, decode_finite, uncast
from fp8train.numerics.formats import dtype_of
from fp8train.numerics.granularity import expand_scales
from fp8train.numerics.scale import scale_from_amax
from fp8train.numerics.scale_state import ScaleSlot, record_amax
from fp8train.numerics.statistics import FIELDS, CastRecorder, cast_statistics
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.problems import refuse

_CONTRACTED = {"output.w": 1, "grad_input.w": 0}
"""Dimension of the weight [N, K] that each GEMM sums over."""


class Fp8Weight:
    """The FP8 copies of one linear's weight: what all kinds of them have in common.

    Attributes:
        quant: how the linear's operands are quantised.
        shape: [N, K] of the weight.
        site: where cast statistics go, and under which name; None keeps none.
        forward: operand of the output GEMM, [N, K] padded; None before the first cast.
        backward: operand of the grad_input GEMM; None where backward casts the high-precision weight, and
            before the first use.
    """

    def __init__(
        self,
        quant: LinearQuant,
        shape: torch.Size,
        device: torch.device,
        *,
        wire: Wire = UNSPLIT,
        slots: Mapping[str, ScaleSlot] | None = None,
        site: tuple[CastRecorder, str] | None = None,
        caster: Caster | None = None,
    ) -> None:
        """Args: ``wire``: how the weight is cut, and so with whom to agree on scales; ``slots``: ``{use:
        slot}`` of at least the delayed ones among the copies' uses, with running maxima; ``caster``: who may
        cast a weight that the layer holds."""
        self.quant, self.shape, self.site, self._caster = quant, shape, site, caster
        self.forward: Operand | None = None
        self.backward: Operand | None = None
        self._wire, self._slots = wire, dict(slots or {})
        self._amax = torch.zeros((), device=device)

    def _uses(self) -> dict[str, QuantSpec]:
        """The copies to make; with ``requantise`` backward recasts the forward's payload instead."""
        second = self.quant.keep_w == "second_copy"
        return {"output.w": self.quant.output_w} | (
            {"grad_input.w": self.quant.grad_input_w} if second else {}
        )

    def _delayed_scale(self, use: str, spec: QuantSpec) -> Tensor | None:
        return self._slots[use].scale if spec.scale_source == "delayed" else None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies, padding and scales included."""
        return self.scale_bytes + sum(payload.nbytes for payload, _ in self._stored())

    @property
    def scale_bytes(self) -> int:
        """Bytes of the copies' scales."""
        return sum(scale_inv.nbytes for _, scale_inv in self._stored())

    def _stored(self) -> list[Operand]:
        copies = {id(copy): copy for copy in (self.forward, self.backward) if copy is not None}
        return list(copies.values())

    def backward_operand(self) -> Operand | None:
        """:attr:`backward`, made if it has yet to be."""
        return self.backward

    def forget(self) -> None:
        """Make what is derived from the weight, and kept, again at its next use."""

    def record_amax(self) -> None:
        """Tell the weight's delayed scales its amax; for training forwards while amaxes are recorded."""
        for use, spec in self._uses().items():
            if spec.scale_source == "delayed":
                running = self._slots[use].amax
                assert running is not None
                record_amax(self._amax, running)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The values that the output GEMM multiplies: [N, K]."""
        assert self.forward is not None, "the FP8 weight was not written yet"
        payload, scale_inv = self.forward
        payload, scale_inv = cropped((payload, scale_inv), *self.shape)
        return uncast(payload, expand_scales(scale_inv, payload.shape), dtype)

    def _active_row(self) -> Tensor | None:
        """Where this step's statistics go; None if it is not sampled."""
        if self.site is None or not self.site[0].active:
            return None
        return self.site[0].row(self.site[1])


class CachedFp8Weight(Fp8Weight):
    """Copies of a weight that the layer holds in the compute dtype."""

    _key: tuple[int, int] | None = None

    def forget(self) -> None:
        """Free the copies, and make the next :meth:`refresh` cast again."""
        self._key = self.forward = self.backward = None

    def refresh(self, weight: nn.Parameter) -> None:
        """Cast ``weight`` unless this storage was cast at this version."""
        key = (weight.data_ptr(), weight._version)
        if self._key == key:
            return
        self._amax.zero_()
        specs = self.quant.output_w, self.quant.grad_input_w
        slots = []
        for use, spec in zip(_CONTRACTED, specs, strict=True):
            scale = self._delayed_scale(use, spec) if use in self._uses() else None
            slots.append(None if scale is None else ScaleSlot(scale, self._amax))
        both = quantize_kept(
            weight,
            self.quant.keep_w,
            specs,
            (slots[0], slots[1]),
            self._active_row(),
            (self._wire.agreement("w", specs[0], 1), self._wire.agreement("w", specs[1], 0)),
            caster=self._caster,
        )
        self.forward = both.rows
        self.backward = None if self.quant.keep_w == "bf16" else both.columns
        self._key = key

    def record_statistics(self, weight: Tensor) -> None:
        """Write the statistics of the current copy; it was cast once, which need not be in this forward."""
        row = self._active_row()
        if row is not None:
            assert self.forward is not None
            payload, scale_inv = cropped(self.forward, *self.shape)
            row.copy_(cast_statistics(weight, payload, expand_scales(scale_inv, payload.shape)))


class LoadedFp8Weight(Fp8Weight):
    """The one copy of a weight in a model without backward, cast when it is loaded."""

    def _uses(self) -> dict[str, QuantSpec]:
        return {"output.w": self.quant.output_w}

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Cast a whole weight, [N, K] in high precision, for the output GEMM."""
        spec = self.quant.output_w
        scale = self._delayed_scale("output.w", spec)
        slot = None if scale is None else ScaleSlot(scale, None)
        self.forward = quantize_operand(values, spec, slot, contracted=_CONTRACTED["output.w"])

    def decode(self) -> None:
        """Keep the codes as BF16 or FP32 numbers of the same values, for GEMMs that would decode them each
        time: on CPUs. A token of generated text multiplies every weight once, and decoding takes longer than
        that. The price is 2 or 4 bytes a code instead of 1."""
        if self.forward is not None and self.forward[0].element_size() == 1:
            payload, scale_inv = self.forward
            dtype = torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
            self.forward = decode_finite(payload, dtype), scale_inv

    def to(self, device: torch.device) -> None:
        """Move the copy to ``device``, if it was loaded."""
        if self.forward is not None:
            payload, scale_inv = self.forward
            self.forward = payload.to(device), scale_inv.to(device)


@dataclass
class _Copy:
    spec: QuantSpec
    payload: Tensor
    scale: Tensor
    scale_inv: Tensor


class ResidentFp8Weight(Fp8Weight):
    """The only copies of a weight. The optimizer writes them: ``begin``, ``write`` each piece, ``end``."""

    def __init__(
        self,
        quant: LinearQuant,
        shape: torch.Size,
        device: torch.device,
        *,
        wire: Wire = UNSPLIT,
        slots: Mapping[str, ScaleSlot] | None = None,
        site: tuple[CastRecorder, str] | None = None,
        caster: Caster | None = None,
    ) -> None:
        """Allocate payloads of zeros; ``caster`` has no part in it, the optimizer writes.

        Raises:
            PrecisionError: ``quant`` keeps the weight in BF16 for backward, or has scales that the optimizer
                cannot fix from the amax of the whole weight before it writes the first piece.
        """
        refuse(quant.against_resident_weights())
        super().__init__(quant, shape, device, wire=wire, slots=slots, site=site)
        self._copies = {use: self._allocate(spec, device) for use, spec in self._uses().items()}
        self._rows: list[tuple[Tensor, int]] = []
        self._taken: tuple[int, StoredWeight] | None = None
        self._at_once = False

    def _allocate(self, spec: QuantSpec, device: torch.device) -> _Copy:
        padded = (aligned(self.shape[0]), aligned(self.shape[1]))
        payload = torch.zeros(padded, dtype=torch.uint8, device=device).view(dtype_of(spec.format))
        return _Copy(spec, payload, torch.ones((), device=device), torch.ones((), device=device))

    def backward_operand(self) -> Operand | None:
        """The copy for backward; on a GPU it is turned at its first use, when other ranks' rows are there,
        unless :meth:`refresh` has written it."""
        if self.backward is None and self.forward is not None:
            copy = self._for_backward
            self.backward = turn_codes(copy.payload).t(), copy.scale_inv
        return self.backward

    def forget(self) -> None:
        """Make the next :meth:`backward_operand` turn the copy again, where it does."""
        if self.forward is not None and self._is_turned:
            self.backward = None

    @property
    def _for_backward(self) -> _Copy:
        return self._copies.get("grad_input.w", self._copies["output.w"])

    @property
    def _is_turned(self) -> bool:
        """Whether backward reads another layout: on GPUs, unless it decodes the codes and casts again."""
        return self.quant.keep_w != "requantise" and fuses(self._for_backward.payload)

    @torch.no_grad()
    def begin(self, amax: Tensor) -> None:
        """Fix the scales of a new weight from its amax; :meth:`write` casts with them.

        Args:
            amax: FP32 scalar on the device: largest magnitude of the whole weight, over all ranks that hold
                a part; NaN if it holds NaN.
        """
        self._amax.copy_(amax)
        self._rows.clear()
        self._taken = None
        for use, copy in self._copies.items():
            scale, scale_inv = scale_from_amax(
                self._amax, copy.spec, delayed=self._delayed_scale(use, copy.spec)
            )
            copy.scale.copy_(scale)
            copy.scale_inv.copy_(scale_inv)

    @torch.no_grad()
    def write(self, start: int, stop: int, values: Tensor) -> None:
        """Cast a piece of the new weight into the payload of each copy.

        Args:
            start: row-major index of the piece's first element in the [N, K] weight.
            stop: index after its last element.
            values: FP32 (or FP64) [stop - start].
        """
        assert values.shape == (stop - start,) and 0 <= start <= stop <= self.shape.numel()
        if start == stop:
            return
        sampled = self._active_row() is not None
        for use, copy in self._copies.items():
            codes = cast(values, copy.spec.format, copy.scale, scale_is_power_of_two=copy.spec.power_of_two)
            _store(copy.payload, self.shape[1], start, codes)
            if sampled and use == "output.w":
                self._rows.append((cast_statistics(values, codes, copy.scale_inv), stop - start))

    @torch.no_grad()
    def take(self, start: int, weight: StoredWeight) -> bool:
        """Make the new weight, or a rank's rows of it, of the stored master: a launch for each copy. Codes
        are made by :meth:`refresh`, and until then the master stays as it is; or at once, after
        :meth:`cast_at_once`.

        Args:
            start: row-major index of the first element, the first of a row.
            weight: the master and the amax of the whole weight.

        Returns:
            Whether that is done. On a sampled step it is not: statistics are of the values in pieces.
        """
        if self._active_row() is not None:
            return False
        first_row, column = divmod(start, self.shape[1])
        assert column == 0, f"element {start} of rows of {self.shape[1]}"
        self._taken = first_row, weight
        self.end()  # frees what backward read: between steps a weight has one layout
        if self._at_once:
            self.refresh(turned=False)
        return True

    @torch.no_grad()
    def refresh(self, *, turned: bool) -> None:
        """Cast the master that was taken last, unless that was done; with ``turned`` in the layout of
        backward too, in the same launch."""
        if self._taken is None:
            return
        (first_row, weight), self._taken = self._taken, None
        for use, copy in self._copies.items():
            other = None
            if turned and self._is_turned and copy is self._for_backward:
                other = _transposed_memory(copy.payload, whole=copy.payload.shape == self.shape)
                self.backward = other.t(), copy.scale_inv
            cast_stored(
                copy.payload,
                (copy.scale, copy.scale_inv),
                self._amax,
                weight,
                CastRule.of(copy.spec),
                delayed=self._delayed_scale(use, copy.spec),
                first_row=first_row,
                turned=other,
            )

    @torch.no_grad()
    def end(self) -> None:
        """Put the copies into use. On a sampled step the weight's row describes what this step wrote."""
        operands = {use: (copy.payload, copy.scale_inv) for use, copy in self._copies.items()}
        self.forward = operands["output.w"]
        self.backward = None if self._is_turned else operands.get("grad_input.w", self.forward)
        row = self._active_row()
        if row is not None and self._rows:
            row.copy_(_merge_statistics(self._rows))
        self._rows.clear()

    def cast_at_once(self) -> None:
        """Cast a master when it is taken, from now on: other ranks get the codes, or what the next forward
        launches is a recording, which knows nothing of how the last weight came."""
        self._at_once = True
        self.refresh(turned=False)

    def specs(self) -> list[QuantSpec]:
        """How each copy is cast, in the order of :meth:`copies`."""
        return [copy.spec for copy in self._copies.values()]

    def copies(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(codes, scale, scale_inv) of each copy: views of the FP8 payload [N, K] and FP32 scalars, for rows
        that other ranks write. From now on :meth:`take` casts at once."""
        self.cast_at_once()
        rows, columns = self.shape
        return [(copy.payload[:rows, :columns], copy.scale, copy.scale_inv) for copy in self._copies.values()]

    def fill(self, values: Tensor) -> None:
        """Write a whole weight [N, K] at once."""
        flat = values.detach().reshape(-1)
        self.begin(amax_of(flat))
        self.write(0, flat.numel(), flat)
        self.end()

    def to(self, device: torch.device) -> None:
        """Move payloads and scales to ``device``."""
        self.refresh(turned=False)
        self._amax = self._amax.to(device)
        for copy in self._copies.values():
            copy.payload, copy.scale = copy.payload.to(device), copy.scale.to(device)
            copy.scale_inv = copy.scale_inv.to(device)
        if self.forward is not None:
            self.end()


FP8_WEIGHTS: Mapping[str, type[Fp8Weight]] = {
    "cached": CachedFp8Weight,
    "resident": ResidentFp8Weight,
    "loaded": LoadedFp8Weight,
}
"""The kind for each way of having a weight (:data:`fp8train.layers.linear_plan.Holding`) that has copies."""


def _transposed_memory(payload: Tensor, *, whole: bool) -> Tensor:
    """Memory of the transpose of FP8 codes, zero where there is padding: unless they are ``whole``."""
    make = torch.empty if whole else torch.zeros
    return make(payload.shape[::-1], dtype=torch.uint8, device=payload.device).view(payload.dtype)


def _store(payload: Tensor, columns: int, start: int, codes: Tensor) -> None:
    """Put row-major elements ``start ..`` of a matrix with ``columns`` columns into its padded payload."""
    if payload.shape[1] == columns:
        payload.view(-1)[start : start + len(codes)] = codes
        return
    row, column = divmod(start, columns)
    if column:  # the rest of a row that an earlier piece began
        head = codes[: columns - column]
        payload[row, column : column + len(head)] = head
        row, codes = row + 1, codes[len(head) :]
    whole, rest = divmod(len(codes), columns)
    payload[row : row + whole, :columns] = codes[: whole * columns].view(whole, columns)
    if rest:
        payload[row + whole, :rest] = codes[whole * columns :]


def _merge_statistics(rows: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The row of a tensor that was cast in pieces, from (row, elements) of each."""
    table = torch.stack([row for row, _ in rows]).double()
    count = torch.tensor([count for _, count in rows], dtype=torch.float64, device=table.device)
    field = {name: table[:, i] for i, name in enumerate(FIELDS)}
    nonzero = (1 - field["zero"]) * count
    signal = field["rms"].square() * count
    noise = (signal * 10 ** (-field["snr_db"] / 10)).sum()
    fourth = (field["kurtosis"] * signal.square() / count).sum() / signal.sum().square()
    merged = {
        "amax": field["amax"].max(),
        "rms": (signal.sum() / count.sum()).sqrt(),
        "log2_scale": field["log2_scale"][0],
        "zero": (field["zero"] * count).sum() / count.sum(),
        "flushed": (field["flushed"] * nonzero).sum() / nonzero.sum().clamp(min=1),
        "saturated": (field["saturated"] * nonzero).sum() / nonzero.sum().clamp(min=1),
        "snr_db": torch.where(noise == 0, torch.inf, 10 * torch.log10(signal.sum() / noise)),
        "kurtosis": torch.where(signal.sum() == 0, torch.zeros_like(noise), fourth * count.sum()),
    }
    return torch.stack([merged[name] for name in FIELDS]).float()
