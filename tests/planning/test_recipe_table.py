"""``fp8train config --recipe``: numbers computed by hand from the configuration."""

from __future__ import annotations

from fp8train.planning.recipe_table import describe_recipe
from tests.training.tiny import tiny_config


def rows(*overrides: str) -> dict[str, str]:
    """Lines of the report by their first column and, for linears, GEMM."""
    text = describe_recipe(tiny_config(list(overrides)))
    found = {}
    for line in text.splitlines():
        cells = [cell for cell in line.split("  ") if cell]
        if len(cells) > 1:
            name = (
                cells[0]
                if "multiplier" in line or len(cells) < 4 or cells[1].strip() not in GEMMS
                else (f"{cells[0]} {cells[1].strip()}")
            )
            found[name] = " | ".join(cell.strip() for cell in cells[1:])
    return found


GEMMS = ("output", "grad_input", "grad_weight")


def test_mus() -> None:
    """32 wide, FFN 64, two blocks: 1/√32, 1/√64, τ = 0.4, lr × √(256/32), S = 2^(3 + log2(128 · 32))."""
    found = rows("precision.recipe=mus", "precision.level=O1")
    assert found["layers.0-1.mlp.up output"].endswith("| 0.1768")
    assert found["layers.0-1.mlp.down grad_weight"].endswith("| 0.125")
    assert "e5m2" in found["layers.0-1.attention.qkv grad_input"]
    assert found["layers.0-1.mlp.down.weight"] == "N(0, 1²) | × 2.828 | fully_decoupled"
    assert found["layers.0-1.mlp joins"].startswith("0.7746 stream + 0.6325 branch")
    assert found["mean loss"].startswith(f"1 | {2.0**15:.4g}")
    assert found["head"].startswith("0.03125 | ")
    assert "effective weights" in found["clip_grad_norm"]


def test_blocks_that_differ_have_rows_of_their_own() -> None:
    found = rows("precision.level=O1", "model.num_layers=5", "precision.gemm.first_layers_bf16=1")
    assert found["layers.0.mlp.up output"] == "output | high precision | 1"
    assert "cur" in found["layers.1-4.mlp.up output"]
    assert found["layers.0-4.mlp.down.weight"] == "N(0, 0.006325²) | × 1 | lr_times_lambda"
    assert "clip_grad_norm" not in found


def test_umup_leaves_out_and_rates() -> None:
    found = rows("precision.recipe=umup", "precision.level=O1", "model.vocab_size=50")
    assert found["layers.0-1.mlp.down output"] == "output | high precision | 0.125"
    assert found["embedding.weight"] == "N(0, 1²) | × 0.1768 | independent"
    assert found["layers.0-1.mlp.up.weight"] == "N(0, 1²) | × 0.08839 | independent"
    assert found["embedding"] == f"1 | {(50 / 128) ** 0.5:.4g}"
    assert not any("norm" in name and name.endswith("weight") for name in found)
