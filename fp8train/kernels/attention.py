"""Scaled dot-product attention, in the type that a device multiplies in (:mod:`fp8train.kernels.matmul`), by
one of the kernels that torch has for it, or by Transformer Engine.

=========  ========================================================================================
backend    what runs
=========  ========================================================================================
flash3     FlashAttention 3, compute capability 9.0: the package ``flash_attn_3``, in torch's place
           for FlashAttention 2 (:func:`torch.nn.attention.activate_flash_attention_impl`)
cudnn      cuDNN's fused attention; its backward pass is not deterministic
flash2     torch's FlashAttention 2
math       matrix products and softmax: any type and device, S x S scores in memory
te         Transformer Engine's choice of fused kernels (:mod:`fp8train.kernels.te.attention`), for
           whole sequences; tokens that follow others in a cache go to torch. Only by its name
=========  ========================================================================================

``auto`` lets torch take, call by call, the first of them that takes the call. Before ``math`` comes torch's
memory-efficient kernel, which alone of the fused ones takes FP32. A backend that is named is the only one
that calls may use, and is refused where the device or the model has no use for it. On a CPU ``auto`` is
torch's own choice.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn import attention as torchs
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fp8train.kernels.matmul import widens
from fp8train.kernels.package_kernels import CausalAttention, RunsOn, on_cuda

Kernel = Literal["flash3", "cudnn", "flash2", "math"]
"""Fastest first."""

_IMPLEMENTATION = "FA3"
"""torch's name for FlashAttention 3."""
_PACKAGE = "flash_attn_interface"
"""Its module, of the package ``flash_attn_3``."""
_IN_TORCH = {
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash2": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
_LENGTH = 128
"""Of the sequences that torch is asked about; kernels take any."""


@dataclass(frozen=True)
class AttentionCall:
    """What training asks of attention: causal, without dropout.

    Attributes:
        dtype: of queries, keys and values.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
    """

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AttentionBackend:
    """Which kernel computes attention on this device, and why it was chosen.

    Attributes:
        name: a :data:`Kernel` where training's calls are known to run in one; what chooses it elsewhere.
        reason: why.
        kernels: what calls may use, in order of preference; empty leaves the choice to torch.
        deterministic: whether results must not depend on timing.
    """

    name: str
    reason: str
    kernels: tuple[SDPBackend, ...] = ()
    deterministic: bool = False

    def __str__(self) -> str:
        return f"{self.name} [{self.reason}]"

    def causal(
        self, *, num_heads: int, num_kv_heads: int, head_dim: int, scale: float, device: torch.device
    ) -> CausalAttention | None:
        """What computes whole sequences of these heads of one process in torch's place; None: torch does."""
        if self.name != "te" or device.type == "meta":
            return None
        from fp8train.kernels.te.attention import TeAttention

        return TeAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=scale,
            deterministic=self.deterministic,
        )


def choose_attention_backend(
    device: torch.device,
    call: AttentionCall,
    *,
    wanted: str = "auto",
    deterministic: bool = False,
    runs_on: RunsOn = on_cuda,
) -> AttentionBackend:
    """The backend for ``device``, chosen once when a model is built; imports and changes nothing.

    Args:
        device: where attention runs.
        call: what training asks of it.
        wanted: a :data:`Kernel`, ``te`` or ``auto``.
        deterministic: results must not depend on timing, those of backward included.
        runs_on: where the kernels of packages run.

    Raises:
        ValueError: the device has no such kernel for the call, or none that is deterministic.
        RuntimeError: Transformer Engine is wanted and does not load.
    """
    if wanted == "te":
        return _by_te(device, call, deterministic=deterministic, runs_on=runs_on)
    named = () if wanted == "auto" else (_IN_TORCH[wanted],)
    if device.type == "meta":
        return AttentionBackend("flash2" if wanted == "auto" else wanted, "meta device: shapes only", named)
    if device.type == "cpu":
        if wanted not in ("auto", "math"):
            raise ValueError(
                f"`attention`: {wanted} is for CUDA devices, and this is a CPU; write `attention`=auto"
            )
        reason = "CPU: torch's own choice" if wanted == "auto" else "as the configuration says"
        return AttentionBackend("torch" if wanted == "auto" else wanted, reason, named)
    if wanted != "auto":
        if (refusal := why_not(wanted, device, call, deterministic=deterministic)) is not None:
            raise ValueError(f"`attention`: {wanted}: {refusal}; write `attention`=auto")
        return AttentionBackend(wanted, "as the configuration says", named)
    refused = {kernel: why_not(kernel, device, call, deterministic=deterministic) for kernel in _IN_TORCH}
    usable = [kernel for kernel, refusal in refused.items() if refusal is None]
    order = [_IN_TORCH[kernel] for kernel in usable]
    order.insert(len(order) - 1, SDPBackend.EFFICIENT_ATTENTION)
    name = usable[0] if len(usable) > 1 else "efficient or math"
    reasons = [f"no {kernel}: {refusal}" for kernel, refusal in refused.items() if refusal is not None]
    return AttentionBackend(name, "; ".join(reasons) or "the fastest", tuple(dict.fromkeys(order)))


def _by_te(
    device: torch.device, call: AttentionCall, *, deterministic: bool, runs_on: RunsOn
) -> AttentionBackend:
    if (refusal := runs_on(device)) is not None:
        raise ValueError(f"`attention`: te {refusal}; write `attention`=auto")
    if device.type == "meta":  # flash2 stands for the kernel
        return AttentionBackend("te", "meta device: shapes only", (_IN_TORCH["flash2"],))
    from fp8train.kernels.te.attention import why_not as why_not_te

    refusal = why_not_te(
        dtype=call.dtype,
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        deterministic=deterministic,
    )
    if refusal is not None:
        raise ValueError(f"`attention`: te: {refusal}; write `attention`=auto")
    return AttentionBackend("te", "as the configuration says", deterministic=deterministic)


def why_not(kernel: str, device: torch.device, call: AttentionCall, *, deterministic: bool) -> str | None:
    """Why this :data:`Kernel` cannot compute the call and its backward pass on a CUDA device, or None. Looks
    for packages without importing them."""
    if kernel == "math":
        return None
    if kernel == "flash3" and (lacking := _lacks_flash3(device)) is not None:
        return lacking
    if kernel == "cudnn" and deterministic:
        return "its backward pass is not deterministic"
    like = torch.empty(1, call.num_heads, _LENGTH, call.head_dim, dtype=call.dtype, device=device)
    query, key, value = (
        like[:, :heads].detach().requires_grad_()
        for heads in (call.num_heads, call.num_kv_heads, call.num_kv_heads)
    )
    params = SDPAParams(query, key, value, None, 0.0, True, call.num_heads > call.num_kv_heads)
    cuda = torch.backends.cuda
    can = cuda.can_use_cudnn_attention if kernel == "cudnn" else cuda.can_use_flash_attention
    if not can(params, False):
        kind = str(call.dtype).removeprefix("torch.")
        return f"torch has no such kernel here for {kind} heads of {call.head_dim}"
    return None


def _lacks_flash3(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"for compute capability 9.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    if importlib.util.find_spec(_PACKAGE) is None:
        return "the package flash_attn_3 is not installed"
    if _IMPLEMENTATION not in getattr(torchs, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} cannot take it in the place of its own"
    return None


def activate(backend: AttentionBackend) -> None:
    """Have torch's FlashAttention be the version that ``backend`` is about, in the whole process.

    Raises:
        ValueError: FlashAttention 3 does not load.
    """
    if not hasattr(torchs, "current_flash_attention_impl"):
        return
    active = torchs.current_flash_attention_impl() == _IMPLEMENTATION
    if active and backend.name != "flash3":
        torchs.restore_flash_attention_impl()
    if active or backend.name != "flash3":
        return
    try:
        torchs.activate_flash_attention_impl(_IMPLEMENTATION)
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"FlashAttention 3 ({_PACKAGE}) does not load: {first}; mend or remove the package flash_attn_3, "
            "or write `attention`=cudnn"
        ) from None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None = None,
    in_fp32: bool = False,
    kernels: tuple[SDPBackend, ...] = (),
) -> Tensor:
    """torch's function of this name; shapes [B, heads, S, D], result in the inputs' dtype. ``in_fp32``: of
    BF16 inputs too, and what backward keeps of the result is not rounded either. ``kernels``: of an
    :class:`AttentionBackend`."""
    dtype = query.dtype
    wide = widens(query) or (in_fp32 and dtype == torch.bfloat16)
    if wide:
        query, key, value = query.float(), key.float(), value.float()
    if query.device.type == "meta":  # shapes only, of the kernel that a GPU runs
        assert attn_mask is None, "attention without values, with a mask"
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, scale=scale)[0]

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, scale=scale
        )

    if kernels:
        with sdpa_kernel(list(kernels), set_priority=True):
            mixed = attend()
    else:
        mixed = attend()
    return mixed.to(dtype) if wide else mixed
