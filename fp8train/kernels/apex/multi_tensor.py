"""NVIDIA apex's multi-tensor kernels: AdamW, norms and casts of many tensors in a few launches.

One launch serves up to 110 tensors (a list of them), 36 (four lists) and 320 chunks of 65,536 elements. Each
call takes a flag: AdamW does nothing where it is 1, norms and casts set it to 1 where a number is not finite.
So each call here has a flag of its own, zero before it. The kernels lose launches that end in an empty
tensor; there must be none.

**AdamW** is ``multi_tensor_adam_capturable``: of the kernels behind ``apex.optimizers.FusedAdam`` the one
that reads learning rate, step and the gradient's multiplier from the device, so that clipping waits for
nothing. In FP32, with β, ε and λ rounded to FP32::

    g <- g·multiplier    m <- β1·m + (1-β1)·g    v <- β2·v + (1-β2)·g²
    w <- w - η·(m/(1-β1^t) / (sqrt(v/(1-β2^t)) + ε) + λ·w)

It writes g back as well. 1-β^t is a difference in FP32 of a power of the rounded β: relative to it the error
is at most about ``2^-24/(1-β)``, 6·10^-5 at 0.999 and 10^-6 at 0.95. v grows by the same rounded 1-β2, so
that most of it cancels, in the first step all.

**Norms** are FP32 sums of squares: 32 numbers and 4 sums one after the other in a thread, 512 threads in 9
levels, then the chunks of a tensor, 512 at a time, in 9 more. With c chunks the relative error of a norm is
at most ``(57 + c/512)·2^-25``, 1.8·10^-6 up to 33 million elements; a sum of squares beyond 3.4·10^38 is
infinite. torch's kernel on GPUs, which it replaces, adds in FP32 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.apex import apex
from fp8train.kernels.package_kernels import AdamNumbers

_CHUNK = 2048 * 32
"""Elements of a thread block's work, as ``apex.multi_tensor_apply`` has it."""
_ADAM_W = 1
"""Weight decay beside the gradient, not in it."""
_CORRECTED = 1
"""The moments are divided by 1-β^t."""
_PER_TENSOR = True


class ApexMultiTensor:
    """apex's kernels on one device (a :class:`~fp8train.kernels.package_kernels.MultiTensor`)."""

    name = "apex's FusedAdam"
    most_elements = 2**31 - 1  # the kernels count in 32 bits

    def __init__(self, device: torch.device) -> None:
        """Raises RuntimeError where apex is not here, does not load or is too old."""
        self._amp_c: Any = apex("amp_C")
        self._device = device

    def adam(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        numbers: AdamNumbers,
        multiplier: Tensor,
    ) -> None:
        """One AdamW step, as the module says."""
        lists = [list(gradients), list(weights), list(exp_avgs), list(exp_avg_sqs)]
        self._amp_c.multi_tensor_adam_capturable(
            _CHUNK,
            self._flag(),
            lists,
            self._scalar(numbers.lr, torch.float32),
            numbers.beta1,
            numbers.beta2,
            numbers.eps,
            self._scalar(numbers.step, torch.int32),
            _ADAM_W,
            _CORRECTED,
            numbers.weight_decay,
            multiplier.float().reshape(1),
        )
        # Written through addresses: who keeps what follows from a tensor asks for its version.
        torch.autograd.graph.increment_version([tensor for tensors in lists for tensor in tensors])

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """FP32 [tensors], as the module says; 0 of empty ones, which no kernel gets. Torch's of those that
        are too large."""
        found = [torch.zeros((), dtype=torch.float32, device=self._device)] * len(tensors)
        large = [i for i, tensor in enumerate(tensors) if tensor.numel() > self.most_elements]
        for i in large:
            found[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float32)
        for dtype in {tensor.dtype for tensor in tensors}:
            fits = (i for i, tensor in enumerate(tensors) if tensor.dtype == dtype and tensor.numel())
            held = [i for i in fits if i not in large]
            if not held:
                continue
            _, norms = self._amp_c.multi_tensor_l2norm(
                _CHUNK, self._flag(), [[tensors[i] for i in held]], _PER_TENSOR
            )
            for i, norm in zip(held, norms.unbind(), strict=True):
                found[i] = norm
        return torch.stack(found)

    def widen(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """FP32 copies of BF16 tensors: the cast of ``multi_tensor_scale``, by 1."""
        wide = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
        self._amp_c.multi_tensor_scale(_CHUNK, self._flag(), [list(tensors), wide], 1.0)
        return wide

    def _flag(self) -> Tensor:
        return self._scalar(0, torch.int32)

    def _scalar(self, value: float, dtype: torch.dtype) -> Tensor:
        """Filled on the device: nothing is copied, nothing waits."""
        return torch.full((1,), value, dtype=dtype, device=self._device)
