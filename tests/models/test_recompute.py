"""Activation checkpointing: the same gradients from fewer saved bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.models.decoder import Decoder
from tests.models.settings import FAMILIES, gradients, random_tokens, tiny_config, tiny_model

MODES = ("none", "selective", "full")


def build(family: str, mode: str, *, fp8: bool, compute: str = "fp32", **model: int) -> Decoder:
    return tiny_model(
        tiny_config(
            {**FAMILIES[family], "init_std": 0.2, **model},
            precision={"compute": compute, "gemm": {"fp8": fp8}},
            train={"activation_checkpointing": mode},
        )
    )


def saved_bytes(model: Decoder, tokens: Tensor, targets: Tensor) -> int:
    """Bytes of activations that a forward keeps for backward; parameters and FP8 weights not counted."""
    model.prepare()
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for linear in model.linears().values():
        for operand in (linear._w_forward, linear._w_backward):
            ours |= {t.untyped_storage().data_ptr() for t in operand or ()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, targets)
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_gradients_are_bit_equal(family: str, fp8: bool, compute: str) -> None:
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24, seed=4)
    expected = gradients(build(family, "none", fp8=fp8, compute=compute), tokens, targets)
    for mode in MODES[1:]:
        found = gradients(build(family, mode, fp8=fp8, compute=compute), tokens, targets)
        assert list(found) == list(expected)
        for name, gradient in expected.items():
            assert gradient.count_nonzero() > 0, name
            assert torch.equal(found[name], gradient), f"{mode}: {name}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("compute", "wide"), [("fp32", 4), ("bf16", 2)])
def test_saved_bytes_of_a_layer(family: str, fp8: bool, compute: str, wide: int) -> None:
    """``full`` keeps a block's input; ``selective`` the inputs of norms, attention, activation and linears.

    Linears keep their inputs in FP8 where they multiply in FP8. Everything else (rotated queries and keys,
    SwiGLU's factors, statistics of norms) is made again.
    """
    tokens, targets = random_tokens(4, 24), random_tokens(4, 24, seed=4)
    per_token = {}
    for mode in MODES:
        models = (build(family, mode, fp8=fp8, compute=compute, num_layers=n) for n in (3, 1))
        deep, shallow = (saved_bytes(model, tokens, targets) for model in models)
        per_token[mode] = (deep - shallow) / 2 / tokens.numel()
    hidden, ffn = 32, 48
    qkv, up = (96, 48) if family == "gpt" else (64, 96)
    inputs_of_linears = (3 * hidden + ffn) * (1 if fp8 else wide)
    scales = 4 * 4 / tokens.numel() if fp8 else 0
    assert per_token["full"] == wide * hidden
    selective = wide * (2 * hidden + qkv + up) + inputs_of_linears + scales
    assert per_token["selective"] == pytest.approx(selective, rel=1e-12)
    assert per_token["none"] > per_token["selective"]
