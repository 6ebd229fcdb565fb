"""An exported model is the imported one, transformers computes with it what we do, FP8 codes are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.exporting import export_command, exported_values, plan_export
from fp8train.huggingface.files import WeightFiles
from fp8train.huggingface.importing import import_command
from fp8train.huggingface.parity import their_logits
from fp8train.inference.load import open_run
from tests.huggingface.models import VARIANTS, logits_of, their_model, tokens_of, transformers, write_run
from tests.models.settings import tiny_config
from tests.numerics.fp8_table import E4M3_TABLE


def export(
    checkpoint: Path, output: Path, dtype: Any = "fp32", *, check: bool = False, **options: Any
) -> Path:
    arguments = {"max_shard_size": "5GB", "text": None, **options}
    assert export_command(checkpoint, output=output, dtype=dtype, check=check, **arguments) == 0
    return output


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(name, "fp32") for name in VARIANTS] + [(name, "bf16") for name in ("llama, llama3 rope", "gpt2")],
)
def test_import_and_export_keep_every_bit(tmp_path: Path, variant: str, dtype: str) -> None:
    """Files equal in names and bits, and transformers gives equal logits from both."""
    theirs = their_model(variant)
    (theirs.bfloat16() if dtype == "bf16" else theirs).save_pretrained(tmp_path / "hf")
    if dtype == "bf16":  # .bfloat16() rounds the rotary frequencies too, loading does not
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    import_command(tmp_path / "hf", output=tmp_path / "run", check=False, text=None)
    export(tmp_path / "run", tmp_path / "back", dtype)
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    after = {name.replace("embed_out", "lm_head"): tensor for name, tensor in after.items()}
    before = {name.replace("embed_out", "lm_head"): tensor for name, tensor in before.items()}
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    tokens = tokens_of(loaded.config.vocab_size)
    assert torch.equal(logits_of(loaded, tokens), logits_of(theirs, tokens))


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each at most of the asked size, and together the same."""
    write_run(tmp_path / "run", tiny_config({"family": "llama"}))
    whole = load_file(export(tmp_path / "run", tmp_path / "one") / "model.safetensors")
    capsys.readouterr()
    folder = export(tmp_path / "run", tmp_path / "many", max_shard_size="20KB")
    assert "21 tensors, 0.1 MB" in capsys.readouterr().out
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    shards = [load_file(file) for file in files]
    sizes = [sum(tensor.numel() * 4 for tensor in shard.values()) for shard in shards]
    assert max(sizes) <= 20_000
    assert sizes[0] + sum(tensor.numel() * 4 for tensor in list(shards[1].values())[:3]) > 20_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {
        name: file.name for file, shard in zip(files, shards, strict=True) for name in shard
    }
    together = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert set(together) == set(whole)
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())
    tokens = tokens_of(length=24)
    assert torch.equal(their_logits(folder)(tokens), their_logits(tmp_path / "one")(tokens))


FOLDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "multipliers of a standard llama": (
        {"family": "llama", "num_kv_heads": 2},
        {"attention_mult": 1.7, "activation_mult": 0.6, "loss_mult": 3.0},
    ),
    "the same, tied, gpt": (
        {"family": "gpt"},
        {"attention_mult": 1.7, "activation_mult": 0.6, "loss_mult": 3.0},
    ),
    "the same, neox, without biases": (
        {"family": "gpt", "positions": "rope", "bias": False, "activation": "gelu_tanh"},
        {"attention_mult": 1.7, "activation_mult": 0.6, "loss_mult": 3.0},
    ),
    "llama, unit-scaled, plain residual": (
        {"family": "llama", "bias": True},
        {"kind": "unit_scaling", "residual": "plain", "activation_mult": 0.6, "loss_mult": 2.0},
    ),
    "gpt, unit-scaled, plain residual": (
        {"family": "gpt", "tie_embeddings": False, "activation": "gelu_tanh"},
        {"kind": "unit_scaling", "residual": "plain", "activation_mult": 0.6},
    ),
    "llama, umup, plain residual, no gains": (
        {"family": "llama", "norm_gain": False},
        {"kind": "umup", "residual": "plain", "attention_mult": 1.3},
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_multipliers_become_weights(tmp_path: Path, case: str) -> None:
    """transformers computes from FP32 weights what the run's model computes with its multipliers."""
    model_settings, parametrization = FOLDED[case]
    unit = "kind" in parametrization
    width = {} if unit else {"init_std": 0.2}
    config = tiny_config(
        {**width, **model_settings}, parametrization={"residual": "plain", **parametrization}
    )
    ours = write_run(tmp_path / "run", config)
    assert unit == (ours.parametrization.settings.kind != "standard")
    tokens = tokens_of(length=24)
    with torch.no_grad():
        expected = ours.logits(tokens)
    found = their_logits(export(tmp_path / "run", tmp_path / "hf"))(tokens)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("model", "sections", "message"),
    [
        ({"family": "llama", "norm_placement": "branch_end"}, {}, "`norm_placement`: branch_end cannot"),
        ({"family": "llama", "qk_norm": "gain"}, {}, "`qk_norm`: gain cannot be exported"),
        ({"family": "llama", "positions": "learned"}, {}, "`positions`: learned cannot be exported"),
        ({"family": "llama", "activation": "gelu"}, {}, "`activation`: gelu cannot be exported"),
        ({"family": "gpt", "activation": "swiglu"}, {}, "`activation`: swiglu cannot be exported"),
        ({"family": "gpt", "num_kv_heads": 2}, {}, "`num_kv_heads`: 2 cannot be exported"),
        ({"family": "gpt", "head_dim": 16}, {}, "`head_dim`: 16 cannot be exported"),
        (
            {"family": "llama"},
            {"parametrization": {"kind": "unit_scaling"}},
            "`residual`: running_mean (kind: unit_scaling) cannot be exported",
        ),
    ],
)
def test_models_that_transformers_has_not(
    tmp_path: Path, model: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    write_run(tmp_path / "run", tiny_config(model, **sections))
    with pytest.raises(HuggingFaceError) as caught:
        export(tmp_path / "run", tmp_path / "hf")
    assert message in str(caught.value)
    assert not (tmp_path / "hf").exists()


WIDE = {"family": "llama", "hidden_size": 128, "num_heads": 4, "head_dim": 64, "num_kv_heads": 2}


def independent_codes(value: Tensor, scale: float) -> Tensor:
    """E4M3 codes of ``value · scale`` from the format's definition, element by element."""
    return torch.tensor([[E4M3_TABLE.encode(x * scale) for x in row] for row in value.double().tolist()])


def largest_scale(amax: float) -> float:
    """The largest power of two that keeps ``amax`` within 448."""
    exponent = -60
    while amax * 2.0 ** (exponent + 1) <= 448.0:
        exponent += 1
    return 2.0**exponent


def test_fp8_blocks(tmp_path: Path) -> None:
    """Every code and scale of two matrices by an independent loop, and by transformers' own reader."""
    config = tiny_config({**WIDE, "ffn_hidden_size": 384, "num_layers": 1})
    write_run(tmp_path / "run", config)
    exact = load_file(export(tmp_path / "run", tmp_path / "fp32") / "model.safetensors")
    folder = export(tmp_path / "run", tmp_path / "fp8", "fp8_block")
    stored = load_file(folder / "model.safetensors")
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        key = f"model.layers.0.{name}.weight"
        codes, scales, value = stored[key], stored[key + "_scale_inv"], exact[key]
        assert codes.dtype == torch.float8_e4m3fn
        assert (scales.dtype, tuple(scales.shape)) == (
            torch.float32,
            (value.shape[0] // 128, value.shape[1] // 128),
        )
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale = largest_scale(float(value[place].abs().max()))
                assert float(scales[i, j]) == 1 / scale
                expected = independent_codes(value[place][:16], scale)
                assert torch.equal(codes[place][:16].view(torch.uint8).long(), expected)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]
    assert quantization["modules_to_not_convert"] == ["lm_head"]

    pytest.importorskip("accelerate", reason="transformers' FP8 reader needs it: pip install accelerate")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokens_of(length=24)
    torch.testing.assert_close(logits_of(loaded, tokens), their_logits(folder)(tokens), rtol=0, atol=1e-6)


def test_fp8_tensors(tmp_path: Path) -> None:
    """q, k and v share the scale of their fused matrix, so an engine that joins them changes no code."""
    write_run(tmp_path / "run", tiny_config({"family": "llama", "num_layers": 1, "num_kv_heads": 2}))
    exact = load_file(export(tmp_path / "run", tmp_path / "fp32") / "model.safetensors")
    folder = export(tmp_path / "run", tmp_path / "fp8", "fp8_tensor")
    stored = load_file(folder / "model.safetensors")
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    groups += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    for group in groups:
        keys = [f"model.layers.0.{name}.weight" for name in group]
        scale = largest_scale(max(float(exact[key].abs().max()) for key in keys))
        for key in keys:
            assert stored[key + "_scale"].tolist() == [1 / scale]
            expected = independent_codes(exact[key], scale)
            assert torch.equal(stored[key].view(torch.uint8).long(), expected), key
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "float-quantized"
    assert quantization["ignore"] == ["lm_head"]
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert weights == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }


def test_fp8_tensors_are_the_weights_of_training(tmp_path: Path) -> None:
    """With the recipe ``current`` the exported codes are those that the run multiplies."""
    config = tiny_config({"family": "llama", "num_kv_heads": 2}, precision={"gemm": {"fp8": True}})
    write_run(tmp_path / "run", config)
    linears = open_run(tmp_path / "run").load("matched", device=torch.device("cpu")).model.linears()
    folder = export(tmp_path / "run", tmp_path / "fp8", "fp8_tensor")
    export_of = plan_export(open_run(tmp_path / "run"), "fp8_tensor")
    with WeightFiles(folder) as files:
        for path, linear in linears.items():
            used = linear.dequantized_weight(torch.float32)
            assert torch.equal(exported_values(export_of, files, f"{path}.weight"), used), path


def test_what_stays_in_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Matrices whose sizes are no multiples of 128, and linears that the run kept out of FP8."""
    precision = {"gemm": {"fp8": True, "first_layers_bf16": 1}}
    config = tiny_config({**WIDE, "ffn_hidden_size": 192}, precision=precision)
    write_run(tmp_path / "run", config)
    folder = export(tmp_path / "run", tmp_path / "fp8", "fp8_block", check=True)
    out = capsys.readouterr().out
    assert (
        "fp8_block: 2 matrices in E4M3, the rest in BF16; left in BF16: not in the run's FP8 plan: 7, " in out
    )
    assert "sizes are not multiples of 128: 3; 25 tensors" in out
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        in_fp8 = {name for name in file.keys() if file.get_slice(name).get_dtype() == "F8_E4M3"}  # noqa: SIM118
    assert in_fp8 == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"} < set(listed)
    assert not {name.removesuffix(".weight") for name in in_fp8} & set(listed)


def test_fp8_that_cannot_be(tmp_path: Path) -> None:
    write_run(tmp_path / "llama", tiny_config({"family": "llama"}))
    with pytest.raises(HuggingFaceError, match=r"no matrix can be in FP8 \(sizes are .*fp8_tensor takes all"):
        export(tmp_path / "llama", tmp_path / "hf", "fp8_block")
    write_run(tmp_path / "gpt", tiny_config({"family": "gpt"}))
    with pytest.raises(HuggingFaceError, match="GPT2LMHeadModel has other ones"):
        export(tmp_path / "gpt", tmp_path / "hf", "fp8_tensor")


def test_a_diverged_run(tmp_path: Path) -> None:
    config = tiny_config({"family": "llama", "init_std": float("1e38")})
    write_run(tmp_path / "run", config)
    with pytest.raises(
        HuggingFaceError, match=r"layers\.0\.\S+ is not finite|embedding.weight is not finite"
    ):
        export(tmp_path / "run", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_parity_notices_a_wrong_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm's eps that is not the run's, in config.json alone."""
    from fp8train.huggingface import exporting

    config = tiny_config({"family": "llama", "init_std": 0.2})
    write_run(tmp_path / "run", config)
    right = exporting._config
    monkeypatch.setattr(exporting, "_config", lambda *args: {**right(*args), "rms_norm_eps": 0.1})
    with pytest.raises(HuggingFaceError, match="nothing was exported"):
        export(tmp_path / "run", tmp_path / "hf", check=True)
    assert not (tmp_path / "hf").exists()
