"""The output head's three GEMMs in FP8 (``precision.gemm.head: fp8``), chunk by chunk as in
:mod:`fp8train.layers.head_gemms`.

=============  =======================  =======================================================
operand        cast                     scale
=============  =======================  =======================================================
hidden         once per micro-batch     its own: of the amax, a power of two; E4M3
weight         once per optimizer step  likewise, over the ranks that hold other rows; E4M3
grad of        once per chunk           constant 2^15; E5M2. ``softmax - onehot`` lies in [-1, 1]
logits                                  whatever the model, so nothing need be measured: 1 becomes
                                        32768 of at most 57344, and 2^-29 is still a normal number,
                                        where an even softmax over 131072 tokens is 2^-17
=============  =======================  =======================================================

Scales are those of tensors under every recipe, so codes serve both GEMMs that read them. Logits and
grad_weight are FP32 (FP64 in FP64 runs), summed without fast accumulation; the gradient of hidden is rounded
once. The gradient is cast from FP32, once: a BF16 head rounds it to BF16 on GPUs.

The weight stays a parameter in the compute type with FP32 states, so checkpoints do not know of this. The
codes take a byte more for each of its elements. What the BF16 head has and this one has not: torch has no FP8
GEMM that adds to its result, so each chunk's grad_weight is added in a pass of its own over [V, H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.gemm_choice import GemmBackend
from fp8train.kernels.matmul import cpu_multiplies_bf16
from fp8train.kernels.padding import pad_to
from fp8train.layers.fp8_operand import Layouts, quantize_layouts, quantize_operand, transposed
from fp8train.layers.linear_plan import Alphas
from fp8train.layers.wire import UNSPLIT, Wire
from fp8train.numerics.cast import decode_finite
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec

OPERAND = QuantSpec(E4M3)
"""Of hidden and weight."""
GRADIENT = QuantSpec(E5M2, scale_source="constant", constant_exponent=15)
"""Of the gradient of logits."""


class Fp8Head:
    """How a model's head multiplies in FP8, and the codes of its weight.

    Attributes:
        keeps: the codes, until the weight changes. Not where the weight has values only while the head runs,
            at addresses that say nothing: it is cast in every forward.
    """

    def __init__(self, backend: GemmBackend, wire: Wire = UNSPLIT) -> None:
        """Args: ``backend``: how GEMMs run; ``wire``: of a column-parallel linear, which the head is where
        the vocabulary is cut: names who else has parts of an operand."""
        self.backend, self._wire, self.keeps = backend, wire, True
        self._key: tuple[int, int] | None = None
        self._weight: Layouts | None = None

    @torch.no_grad()
    def weight(self, weight: Tensor) -> Layouts:
        """Codes of this rank's rows [V, H], padded to multiples of 16; cast if the weight has changed."""
        key = (weight.data_ptr(), weight._version)
        if self._weight is not None and self._key == key:
            return self._weight
        agree = self._wire.agreement("w", OPERAND, 1)
        codes = quantize_layouts(weight, OPERAND, agree=agree, contracted=1)
        if self.keeps:
            self._weight, self._key = codes, key
        return codes

    def forget(self) -> None:
        """Free the codes, and make the next :meth:`weight` cast again."""
        self._key = self._weight = None

    def decode(self, weight: Tensor) -> None:
        """Keep the codes of a weight that is not trained as BF16 or FP32 numbers of the same values, on a CPU
        whose GEMMs would decode them for each token: as
        :meth:`~fp8train.layers.fp8_weight.LoadedFp8Weight.decode`."""
        assert not weight.requires_grad, "backward reads codes"
        codes, scale_inv = self.weight(weight).rows
        if self.backend.name == "decode" and codes.device.type == "cpu" and codes.element_size() == 1:
            dtype = torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
            decoded = decode_finite(codes, dtype), scale_inv
            self._weight = Layouts(decoded, decoded)

    def hidden(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(codes [T, H padded], scale_inv) of hidden [T, H]."""
        agree = self._wire.agreement("x", OPERAND, 1)
        codes, scale_inv = quantize_operand(hidden, OPERAND, agree=agree, contracted=1)
        return codes[: len(hidden)], scale_inv

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale of the weight's codes."""
        return 0 if self._weight is None else self._weight.rows[1].nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the weight's codes, padding, second layout and scale included."""
        if self._weight is None:
            return 0
        payloads = {id(operand[0]): operand[0] for operand in self._weight}
        return self.scale_bytes + sum(payload.nbytes for payload in payloads.values())


class Fp8HeadGemms:
    """The GEMMs of one forward pass, with the interface of :class:`~fp8train.layers.head_gemms.HeadGemms`;
    the ``hidden`` of its methods are rows of what :meth:`take` returned."""

    def __init__(
        self, head: Fp8Head, weight: Tensor, *, choices: int | None, alphas: Alphas, needs_grad: bool
    ) -> None:
        """Cast the weight if it has changed, and allocate grad_weight.

        Args:
            head: of the model.
            weight: [V, H].
            choices: rows of it that have logits; None: all.
            alphas: multipliers of logits, of the gradient of hidden and of that of weight.
            needs_grad: whether gradients will be asked for.
        """
        self.wide = self.grad_logits_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.grad_hidden_dtype = weight.dtype
        self._head, self._alphas, self._weight = head, alphas, head.weight(weight)
        self._choices, self._shape = choices or len(weight), weight.shape
        self._scale_inv: Tensor | None = None
        self.grad_weight = (
            torch.zeros(weight.shape, dtype=self.wide, device=weight.device) if needs_grad else None
        )

    def take(self, hidden: Tensor) -> Tensor:
        """Cast the input of all chunks: [T, H] -> codes [T, H padded]."""
        codes, self._scale_inv = self._head.hidden(hidden)
        return codes

    def logits(self, hidden: Tensor) -> Tensor:
        """``alpha · hidden @ weight.T``: [t, H padded] -> [t, V] in :attr:`wide`."""
        out, alpha = self.unscaled_logits(hidden)
        return out if alpha == 1.0 else out.mul_(alpha)

    def unscaled_logits(self, hidden: Tensor) -> tuple[Tensor, float]:
        """``hidden @ weight.T`` as :meth:`logits`, and what it is still to be multiplied by."""
        assert self._scale_inv is not None, "take comes first"
        out = self._multiply((hidden, self._scale_inv), transposed(self._weight.rows), 1.0, self.wide)
        return out[:, : self._choices].contiguous(), self._alphas.output

    def grad_logits(self, gradient: Tensor) -> Tensor:
        """The gradient of the logits as :meth:`backward` takes it: as it is."""
        return gradient

    def backward(self, gradient: Tensor, hidden: Tensor, out: Tensor) -> None:
        """Cast ``gradient`` [t, V]; ``out = alpha · gradient @ weight`` [t, H] in :attr:`grad_hidden_dtype`;
        ``grad_weight += alpha · gradient.T @ hidden``."""
        assert self.grad_weight is not None and self._scale_inv is not None, "made without gradients"
        rows, columns = quantize_layouts(gradient, GRADIENT, contracted=1)
        product = self._multiply(rows, self._weight.columns, self._alphas.grad_input, out.dtype)
        out.copy_(product[: len(out), : out.shape[1]])
        x = pad_to(hidden, len(rows[0]), hidden.shape[1]), self._scale_inv
        product = self._multiply(transposed(columns), x, self._alphas.grad_weight, self.wide)
        self.grad_weight += product[: self._shape[0], : self._shape[1]]

    def _multiply(
        self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], alpha: float, dtype: torch.dtype
    ) -> Tensor:
        return fp8_gemm(
            a[0],
            b[0],
            a[1],
            b[1],
            alpha=alpha,
            power_of_two=True,
            out_dtype=dtype,
            backend=self._head.backend.name,
        )
