"""Which kernel computes attention, what is refused, and that the choice reaches torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch.nn import attention as torchs
from torch.nn.attention import SDPBackend

from fp8train.kernels import attention as module
from fp8train.kernels.attention import (
    AttentionBackend,
    AttentionCall,
    activate,
    choose_attention_backend,
    scaled_dot_product_attention,
    why_not,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CALL = AttentionCall(torch.bfloat16, num_heads=4, num_kv_heads=2, head_dim=64)
FLASH, CUDNN, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION


def usable(*kernels: str) -> Callable[..., str | None]:
    """A device that has these kernels."""
    return lambda kernel, *_, **__: None if kernel in (*kernels, "math") else "not here"


@pytest.mark.parametrize(
    ("kernels", "name", "order"),
    [
        (("flash3", "cudnn", "flash2"), "flash3", (FLASH, CUDNN, EFFICIENT, MATH)),
        (("cudnn", "flash2"), "cudnn", (CUDNN, FLASH, EFFICIENT, MATH)),
        (("flash2",), "flash2", (FLASH, EFFICIENT, MATH)),
        ((), "efficient or math", (EFFICIENT, MATH)),
    ],
)
def test_auto_prefers_the_fastest_and_leaves_the_others_to_calls_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, kernels: tuple[str, ...], name: str, order: tuple[SDPBackend, ...]
) -> None:
    monkeypatch.setattr(module, "why_not", usable(*kernels))
    backend = choose_attention_backend(CUDA, CALL)
    assert (backend.name, backend.kernels) == (name, order)
    assert ("no flash3: not here" in backend.reason) == ("flash3" not in kernels)


def test_a_named_backend_is_the_only_one_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_not", usable("flash2"))
    backend = choose_attention_backend(CUDA, CALL, wanted="flash2")
    assert str(backend) == "flash2 [as the configuration says]"
    assert backend.kernels == (FLASH,)
    with pytest.raises(ValueError, match="`attention`: cudnn: not here; write `attention`=a"):
        choose_attention_backend(CUDA, CALL, wanted="cudnn")


@pytest.mark.parametrize("wanted", ["flash3", "cudnn", "flash2"])
def test_a_cpu_has_none_of_them(wanted: str) -> None:
    with pytest.raises(ValueError, match=f"{wanted} is for CUDA devices, and this is a CPU"):
        choose_attention_backend(CPU, CALL, wanted=wanted)


def test_a_cpu_leaves_auto_to_torch() -> None:
    assert choose_attention_backend(CPU, CALL).kernels == ()
    assert choose_attention_backend(CPU, CALL, wanted="math").kernels == (MATH,)


def test_cudnn_has_no_deterministic_backward() -> None:
    assert why_not("cudnn", CUDA, CALL, deterministic=True) == "its backward pass is not deterministic"
    assert why_not("math", CUDA, CALL, deterministic=True) is None


@pytest.mark.parametrize(
    ("capability", "installed", "listed", "told"),
    [
        ((10, 0), True, ["FA3"], "for compute capability 9.0, a GPU has 10.0"),
        ((9, 0), False, ["FA3"], "the package flash_attn_3 is not installed"),
        ((9, 0), True, ["FA4"], "cannot take it in the place of its own"),
    ],
)
def test_flash3_needs_its_device_its_package_and_a_torch_that_takes_it(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: bool,
    listed: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torchs, "list_flash_attention_impls", lambda: listed)
    assert told in (why_not("flash3", CUDA, CALL, deterministic=False) or "")


def test_torch_is_asked_about_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine's device, whose answer is replaced: torch is told of the call and its gradient."""
    asked = []

    def no(params: torch.backends.cuda.SDPAParams, debug: bool) -> bool:
        asked.append(params)
        return False

    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", no)
    told = why_not("cudnn", CPU, CALL, deterministic=False)
    assert told == "torch has no such kernel here for bfloat16 heads of 64"
    (params,) = asked
    assert params.query.shape == (1, 4, 128, 64) and params.key.shape == params.value.shape == (1, 2, 128, 64)
    assert params.is_causal and params.enable_gqa and params.query.requires_grad and params.key.requires_grad


def test_flash3_takes_the_place_of_flash2_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[str] = []
    monkeypatch.setattr(torchs, "current_flash_attention_impl", lambda: active[-1] if active else None)
    monkeypatch.setattr(torchs, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torchs, "restore_flash_attention_impl", active.clear)
    for name, expected in (("flash2", []), ("flash3", ["FA3"]), ("flash3", ["FA3"]), ("cudnn", [])):
        activate(AttentionBackend(name, ""))
        assert active == expected, name


def test_flash3_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol\nmore")

    monkeypatch.setattr(torchs, "activate_flash_attention_impl", fail)
    with pytest.raises(ValueError, match="does not load: undefined symbol; mend or remove"):
        activate(AttentionBackend("flash3", ""))


def _inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, heads, 16, 64, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


def test_the_choice_reaches_torch() -> None:
    """FP64's plain attention is the truth; torch is asked while it computes which kernels it may take."""
    tensors = _inputs()
    settings = {"attn_mask": None, "is_causal": True, "enable_gqa": True, "scale": 0.2}
    seen = []
    torch_function = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append(torchs._cur_sdpa_kernel_backends(with_priority=True))
        return torch_function(*args, **kwargs)  # type: ignore[arg-type]

    before = torchs._cur_sdpa_kernel_backends(with_priority=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        mixed = [
            scaled_dot_product_attention(*tensors, **settings, kernels=kernels)  # type: ignore[arg-type]
            for kernels in ((), (MATH,), (EFFICIENT, FLASH, MATH))
        ]
    assert seen == [before, [MATH], [EFFICIENT, FLASH, MATH]]
    assert torchs._cur_sdpa_kernel_backends(with_priority=True) == before
    query, key, value = (x.detach().double() for x in tensors)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.transpose(2, 3) * 0.2).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    exact = scores.softmax(-1) @ value
    for one in mixed:
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "flash3", "cudnn", "flash2", "math"])
def test_every_backend_computes_attention(wanted: str) -> None:
    try:
        backend = choose_attention_backend(CUDA, CALL, wanted=wanted)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    activate(backend)
    tensors = [x.detach().to(CUDA, torch.bfloat16).requires_grad_() for x in _inputs()]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    settings = {"attn_mask": None, "is_causal": True, "enable_gqa": True}
    mixed = scaled_dot_product_attention(*tensors, **settings, kernels=backend.kernels)  # type: ignore[arg-type]
    exact = scaled_dot_product_attention(*wide, **settings)  # type: ignore[arg-type]
    mixed.float().square().sum().backward()
    exact.square().sum().backward()
    torch.testing.assert_close(mixed.double(), exact, rtol=2e-2, atol=2e-2)
    for one, other in zip(tensors, wide, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=5e-2, atol=5e-2)
