"""Attention by Transformer Engine, through a fake that checks layouts and computes in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.attention import AttentionCall, choose_attention_backend
from fp8train.kernels.package_kernels import CausalAttention
from fp8train.layers.attention import Attention, KVCache
from tests.fakes import te_layers_fake
from tests.fakes.transformer_engine_fake import install

CPU = torch.device("cpu")
HEADS, GROUPS, DIM, LENGTH, SCALE = 6, 2, 16, 20, 0.3
CALL = AttentionCall(torch.bfloat16, HEADS, GROUPS, DIM)


def anywhere(device: torch.device) -> None:
    """The fake runs on any device."""


def made() -> CausalAttention:
    backend = choose_attention_backend(CPU, CALL, wanted="te", runs_on=anywhere)
    function = backend.causal(num_heads=HEADS, num_kv_heads=GROUPS, head_dim=DIM, scale=SCALE, device=CPU)
    assert function is not None
    return function


def tensors(seed: int = 0) -> list[Tensor]:
    """Queries, keys and values as they come: transposed views of one projection."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, LENGTH, HEADS + 2 * GROUPS, DIM, generator=generator).bfloat16()
    parts = wide.split([HEADS, GROUPS, GROUPS], dim=2)
    return [part.transpose(1, 2).detach().requires_grad_() for part in parts]


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By torch, in FP64."""
    wide = (x.double() for x in (query, key, value))
    return F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True, scale=SCALE)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())


def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch in FP64, rounded once, and the same shape and order of heads."""
    install(monkeypatch, te_layers_fake.attention())
    inputs = tensors()
    upstream = torch.randn(2, HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    mixed, right = made()(*inputs), exact(*inputs)
    assert mixed.shape == right.shape and mixed.dtype == torch.bfloat16
    assert error(mixed, right) <= 2.0**-9
    ours = torch.autograd.grad(mixed, inputs, upstream)
    theirs = torch.autograd.grad(right, inputs, upstream.double())
    assert all(error(a, b.double()) <= 2.0**-7 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("qkv_format", "sbhd"), ("attn_mask_type", "no_mask"), ("softmax_scale", None), ("scaled", None)],
)
def test_a_wrong_argument_would_be_seen(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout, a mask and a scale that are not ours."""
    install(monkeypatch, te_layers_fake.attention())
    real = te_layers_fake.DotProductAttention.__init__

    def wrong(self: te_layers_fake.DotProductAttention, *args: int, **named: object) -> None:
        named = named | ({"softmax_scale": SCALE * 1.1} if name == "scaled" else {name: value})
        real(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(te_layers_fake.DotProductAttention, "__init__", wrong)
    inputs = tensors()
    assert error(made()(*inputs), exact(*inputs)) > 2.0**-8


def test_each_tensor_is_handed_over_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous tensors of one buffer are copied, others that are right already are not."""
    install(monkeypatch, te_layers_fake.attention())
    batch, attend = 2, made()
    buffer = torch.randn(3, batch, LENGTH, HEADS, DIM).bfloat16()
    query, key, value = (buffer[i].transpose(1, 2) for i in (2, 0, 1))
    attend(query, key[:, :GROUPS], value[:, :GROUPS])  # the fake refuses what TE might take for packed
    with pytest.raises(AssertionError):
        attend._attend(*(x.transpose(1, 2) for x in (query, key, value)))  # type: ignore[attr-defined]
    own = torch.randn(batch, LENGTH, HEADS, DIM).bfloat16().transpose(1, 2)
    from fp8train.kernels.te.attention import _alone

    assert _alone(own).data_ptr() == own.data_ptr()


def layer(dtype: torch.dtype = torch.bfloat16) -> Attention:
    made = Attention(
        hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, bias=False, dtype=dtype, logits_scale=0.2
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def test_generation_goes_on_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens with a cache, the first ones too; and TE's module adds nothing to what is saved."""
    recorder = install(monkeypatch, te_layers_fake.attention())
    attention = layer()
    names = set(attention.state_dict())
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    torchs = attention(x, None, None)
    call = AttentionCall(torch.bfloat16, 4, 2, 16)
    attention.use(choose_attention_backend(CPU, call, wanted="te", runs_on=anywhere))
    assert error(attention(x, None, None), torchs.double()) <= 2.0**-6
    assert recorder.calls == ["get_attention_backend", "attention"]
    assert recorder.arguments[1] == {"scale": 0.2} and set(attention.state_dict()) == names
    cache = KVCache(1, 2, 8, 16, x)
    pieces = [attention(x[:, rows], None, None, cache) for rows in (slice(0, 5), slice(5, 8))]
    assert recorder.calls.count("attention") == 1
    assert error(torch.cat(pieces, dim=1), torchs.double()) <= 2.0**-6


def test_deterministic_is_asked_for_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = install(monkeypatch, te_layers_fake.attention())
    backend = choose_attention_backend(CPU, CALL, wanted="te", deterministic=True, runs_on=anywhere)
    assert recorder.arguments[0]["deterministic"] is True and backend.deterministic
    heads = {"num_heads": HEADS, "num_kv_heads": GROUPS, "head_dim": DIM}
    with pytest.raises(AssertionError, match="made before kernels were deterministic"):
        backend.causal(**heads, scale=SCALE, device=CPU)  # the run's switch was forgotten
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert backend.causal(**heads, scale=SCALE, device=CPU) is not None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (AttentionCall(torch.float32, 4, 2, 64), "its fused kernels compute in bfloat16, not in float32"),
        (AttentionCall(torch.float64, 4, 2, 64), "its fused kernels compute in bfloat16, not in float64"),
        (AttentionCall(torch.bfloat16, 4, 2, 264), "heads of 264: its kernels take multiples of 8 up to 256"),
        (AttentionCall(torch.bfloat16, 4, 2, 36), "heads of 36: its kernels take multiples of 8 up to 256"),
    ],
)
def test_calls_that_te_has_no_fused_kernel_for(
    call: AttentionCall, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, te_layers_fake.attention())
    with pytest.raises(ValueError, match=f"`attention`: te: {says}; write `attention`=auto"):
        choose_attention_backend(CPU, call, wanted="te", runs_on=anywhere)


def test_scores_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TE would fall back to without a word."""
    install(monkeypatch, te_layers_fake.attention(by_cudnn=False))
    with pytest.raises(ValueError, match="te: no deterministic fused kernel here for heads of 16"):
        choose_attention_backend(CPU, CALL, wanted="te", deterministic=True, runs_on=anywhere)
    install(monkeypatch, te_layers_fake.attention(by_cudnn=False, by_flash=True))
    assert choose_attention_backend(CPU, CALL, wanted="te", runs_on=anywhere).name == "te"


def test_a_cpu_and_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`attention`: te is for CUDA devices, and this is a CPU"):
        choose_attention_backend(CPU, CALL, wanted="te")
    meta = choose_attention_backend(torch.device("meta"), CALL, wanted="te")
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    assert meta.name == "te" and meta.causal(**heads, scale=1.0, device=torch.device("meta")) is None
