"""Every config we ship loads, has the published size, and the published hyper-parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.cli import run_command
from fp8train.config.dump import dump_yaml
from fp8train.config.model_schema import ModelConfig
from fp8train.config.recipe_registry import RECIPES
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


def num_parameters(model: ModelConfig, vocab_size: int | None = None) -> int:
    """Parameters of a decoder, counted tensor by tensor from the papers' definitions."""
    width, vocab = model.hidden_size, vocab_size or model.vocab_size
    assert vocab is not None
    query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = width * query + 2 * width * kv + query * width
    mlp = width * model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    norm = width * (2 if model.norm == "layernorm" and model.bias else 1)
    biases = (query + 2 * kv + width) + (model.ffn_hidden_size + width) if model.bias else 0
    assert not (model.bias and model.activation == "swiglu")
    embeddings = vocab * width * (1 if model.tie_embeddings else 2)
    positions = model.max_seq_len * width if model.positions == "learned" else 0
    return model.num_layers * (attention + mlp + 2 * norm + biases) + norm + embeddings + positions


PUBLISHED = {
    # Exact: the weights' own index files on Hugging Face (total_size / 2 bytes).
    "llama/llama2_7b.yaml": (6_738_415_616, 0.0),
    "llama/llama2_13b.yaml": (13_015_864_320, 0.0),
    "llama/llama2_70b.yaml": (68_976_648_192, 0.0),
    "llama/llama3_8b.yaml": (8_030_261_248, 0.0),
    "llama/llama3_70b.yaml": (70_553_706_496, 0.0),
    # Nominal: the papers round; 7B is 6.65e9 with its vocabulary.
    "gpt/125m.yaml": (125e6, 0.02),
    "gpt/345m.yaml": (345e6, 0.03),
    "gpt/1.3b.yaml": (1.3e9, 0.02),
    "gpt/7b.yaml": (7e9, 0.06),
    "gpt/13b.yaml": (13e9, 0.02),
    "gpt/175b.yaml": (175e9, 0.01),
}


@pytest.mark.parametrize("name", FILES)
def test_loads_and_prints(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", str(CONFIGS / name)]) == 0
    assert str(CONFIGS / name) in capsys.readouterr().out
    config = load_config(CONFIGS / name).config
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert load_config(again).config == config
    assert config.data.prefix is not None
    assert not Path(config.data.prefix).is_absolute()


def test_every_size_is_checked() -> None:
    others = ("engines/", "quickstart/", "small/", "ablations/", "experiments/", "3d/", "recipes/", "sft/")
    sizes = {name for name in FILES if not name.startswith(others)}
    assert sizes == set(PUBLISHED)


TABLE_6 = {
    # GEMMs and gradients, master, first and second moment (FP8-LM, Table 6)
    "table6_0": ("fp32", "high_precision", "fp32", "fp32", "fp32"),
    "table6_1": ("bf16", "high_precision", "fp32", "fp32", "fp32"),
    "table6_2a": ("fp8", "e4m3", "fp16_scaled", "e4m3", "fp16_scaled"),
    "table6_2b": ("fp8", "e4m3", "bf16", "e4m3", "fp16_scaled"),
    "table6_3": ("fp8", "e4m3", "e4m3", "e4m3", "fp16_scaled"),
    "table6_4": ("fp8", "e4m3", "fp16_scaled", "e4m3", "e4m3"),
    "fp8_gemms_only": ("fp8", "high_precision", "fp32", "fp32", "fp32"),
}


@pytest.mark.parametrize("name", TABLE_6)
def test_ablations_are_the_papers(name: str) -> None:
    precision = load_config(CONFIGS / f"ablations/{name}.yaml").config.precision
    state = precision.state
    gemm = "fp8" if precision.gemm.fp8 else precision.compute
    formats = (state.master.format, state.exp_avg.format, state.exp_avg_sq.format)
    assert (gemm, precision.gradient.format, *formats) == TABLE_6[name]
    if precision.gradient.format == "e4m3":
        assert precision.gradient.fp8.reduce == "shared_scale"
        scaled = [one for one in (state.master, state.exp_avg, state.exp_avg_sq) if one.format != "bf16"]
        assert {one.granularity for one in scaled} == {"tensor"}
    assert {f"ablations/{ablation}.yaml" for ablation in TABLE_6} == {
        file for file in FILES if file.startswith("ablations/")
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_the_published_one(name: str) -> None:
    expected, tolerance = PUBLISHED[name]
    assert num_parameters(load_config(CONFIGS / name).config.model) == pytest.approx(
        expected, rel=tolerance, abs=0
    )


@pytest.mark.parametrize(
    ("name", "lr", "batch_tokens", "tokens"),
    [
        ("gpt/125m.yaml", 6e-4, 2**20, 100e9),
        ("gpt/7b.yaml", 3e-4, 2**22, 100e9),
        ("gpt/13b.yaml", 3e-4, 2**22, 100e9),
        ("gpt/175b.yaml", 3e-5, 2**20, 40e9),
    ],
)
def test_fp8_lm_table_1(name: str, lr: float, batch_tokens: int, tokens: float) -> None:
    config = load_config(CONFIGS / name).config
    assert config.optimizer.lr == lr
    assert config.train.global_batch_size * config.data.seq_length == batch_tokens
    assert config.train.tokens == tokens
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.schedule.kind, config.schedule.warmup_steps, config.schedule.min_lr_ratio) == (
        "cosine",
        1000,
        0.1,
    )
    assert (config.model.positions, config.data.seq_length) == ("rope", 2048)


def without_name(config: Config) -> dict[str, object]:
    plain = config.model_dump()
    del plain["run"]["name"]
    return plain


@pytest.mark.parametrize("folder", ["quickstart", "small"])
def test_a_pair_differs_in_fp8_only(folder: str) -> None:
    bf16 = without_name(load_config(CONFIGS / f"{folder}/llama.yaml").config)
    fp8 = without_name(load_config(CONFIGS / f"{folder}/llama_fp8.yaml").config)
    assert not bf16["precision"]["gemm"].pop("fp8")
    assert fp8["precision"]["gemm"].pop("fp8")
    assert bf16 == fp8


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [("quickstart/llama", 4096, 0.385e6), ("quickstart/gpt", 4096, 0.43e6), ("small/llama", 12288, 3.15e6)],
)
def test_small_models_need_no_padding(name: str, vocab_size: int, parameters: float) -> None:
    config = load_config(CONFIGS / f"{name}.yaml").config
    model = config.model
    assert num_parameters(model, vocab_size) == pytest.approx(parameters, rel=0.05)
    kv = model.num_kv_heads * model.head_dim
    for dim in (model.hidden_size, model.num_heads * model.head_dim, kv, model.ffn_hidden_size):
        assert dim % 16 == 0
    assert config.total_steps * config.train.global_batch_size * config.data.seq_length >= 250_000


def test_every_recipe_has_a_config_that_chooses_it() -> None:
    recipes = {file.removeprefix("recipes/").removesuffix(".yaml") for file in FILES if "recipes/" in file}
    assert recipes == set(RECIPES)
    for name in recipes:
        assert load_config(CONFIGS / f"recipes/{name}.yaml").config.precision.recipe == name
