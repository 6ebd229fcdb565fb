"""The decoder: cached generation, losses, names, and what printing it shows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fp8train.models.build import build_model
from tests.models.settings import FAMILIES, VOCAB_SIZE, random_tokens, tiny_config, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[1] * 24, [10] + [1] * 14, [9, 8, 7], [24]])
def test_cached_logits_equal_those_of_the_whole_sequence(family: str, pieces: list[int]) -> None:
    config = tiny_config({**FAMILIES[family], "init_std": 0.2}, precision={"compute": "fp64"})
    model = tiny_model(config)
    tokens = random_tokens(3, 24)
    with torch.no_grad():
        whole = model.logits(tokens)
        caches = model.make_caches(3, 24)
        parts, start = [], 0
        for size in pieces:
            parts.append(model.logits(tokens[:, start : start + size], caches))
            start += size
    assert whole.shape == (3, 24, VOCAB_SIZE)
    assert whole.std() > 0.1
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_cross_entropy_of_the_logits(family: str) -> None:
    model = tiny_model(tiny_config({**FAMILIES[family], "init_std": 0.2}, precision={"compute": "fp64"}))
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24, seed=4)
    targets[0, 5:9] = -100
    expected = F.cross_entropy(model.logits(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_sees_only_the_past(family: str) -> None:
    model = tiny_model(tiny_config({**FAMILIES[family], "init_std": 0.2}, precision={"compute": "fp64"}))
    tokens = random_tokens(1, 24)
    changed = tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % VOCAB_SIZE
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-13)
    assert ((before - after)[:, 15:].abs().amax(dim=-1) > 1e-3).all()


def test_too_long_a_sequence_is_refused() -> None:
    model = tiny_model(tiny_config(FAMILIES["llama"]))
    with pytest.raises(AssertionError, match="25 positions exceed max_seq_len 24"):
        model.hidden(random_tokens(1, 25))


def test_names_are_those_of_the_checkpoint_format() -> None:
    gpt = tiny_model(tiny_config({**FAMILIES["gpt"], "num_layers": 1}))
    assert list(gpt.state_dict()) == [
        "embedding.weight",
        "positions.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention_norm.bias",
        "layers.0.attention.qkv.weight",
        "layers.0.attention.qkv.bias",
        "layers.0.attention.out.weight",
        "layers.0.attention.out.bias",
        "layers.0.mlp_norm.weight",
        "layers.0.mlp_norm.bias",
        "layers.0.mlp.up.weight",
        "layers.0.mlp.up.bias",
        "layers.0.mlp.down.weight",
        "layers.0.mlp.down.bias",
        "final_norm.weight",
        "final_norm.bias",
    ]
    llama = tiny_model(tiny_config({**FAMILIES["llama"], "num_layers": 1}))
    assert list(llama.state_dict()) == [
        "embedding.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention.qkv.weight",
        "layers.0.attention.out.weight",
        "layers.0.mlp_norm.weight",
        "layers.0.mlp.up.weight",
        "layers.0.mlp.down.weight",
        "final_norm.weight",
        "head.weight",
    ]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("compile_blocks", ["off", "block"])
def test_no_setting_changes_a_name(mode: str, compile_blocks: str) -> None:
    plain = tiny_model(tiny_config(FAMILIES["gpt"]))
    train = {"activation_checkpointing": mode, "compile": compile_blocks}
    model = tiny_model(tiny_config(FAMILIES["gpt"], train=train))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(model.specs) == [name for name, _ in plain.named_parameters()]


def test_printing_shows_the_recipe_of_every_linear() -> None:
    precision = {"gemm": {"fp8": True, "exclude": ["layers.1.mlp.*"]}}
    model = tiny_model(tiny_config(FAMILIES["llama"], precision=precision))
    lines = str(model).splitlines()
    linears = [line.strip() for line in lines if ": Linear(" in line]
    assert len(linears) == 8
    casts = "x=e4m3:cur/tensor/pow2 w=e4m3:cur/tensor/pow2 grad_output=e5m2:cur/tensor/pow2"
    recipe = f"fp8[{casts} fast_accumulation]"
    assert linears[0] == f"(qkv): Linear(32 -> 64, bias=False, {recipe})"
    assert [recipe in line for line in linears] == [True] * 6 + [False] * 2
    assert linears[-1] == "(down): Linear(48 -> 32, bias=False, float32)"


def test_vocabulary_of_the_config_wins_over_the_tokenizers() -> None:
    config = tiny_config({**FAMILIES["llama"], "vocab_size": 70})
    model = build_model(config, vocab_size=VOCAB_SIZE, device=CPU).model
    assert model.config.vocab_size == 70
    assert model.embedding.weight.shape == (80, 32)


def test_conversion_of_an_fp8_model_is_refused() -> None:
    model = tiny_model(tiny_config(FAMILIES["llama"], precision={"gemm": {"fp8": True}}))
    with pytest.raises(TypeError, match="silently change its numerics"):
        model.to(torch.bfloat16)
