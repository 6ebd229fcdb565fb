"""The ``parametrization`` section: what recipes fill, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.config.dump import dump_yaml
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import load_config, resolve_mapping
from tests.config.examples import MINIMAL, message_of, minimal, write

STATIC = ("mus", "unit_scaling", "umup")


@pytest.mark.parametrize("recipe", STATIC)
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_one_line_chooses_casts_and_parametrisation(recipe: str, level: str) -> None:
    resolved = resolve_mapping(minimal(), [f"precision.recipe={recipe}", f"precision.level={level}"])
    config = resolved.config
    assert config.parametrization.kind == recipe
    assert str(resolved.origins["parametrization.kind"]) == f"preset precision.recipe={recipe}"
    assert not config.model.tie_embeddings
    gemm = config.precision.gemm
    for operand in (gemm.output.x, gemm.output.w, gemm.grad_input.grad_output, gemm.grad_weight.x):
        assert (operand.scale_source, operand.constant_exponent) == ("constant", 0)
    assert gemm.grad_input.grad_output.format == "e5m2"


def test_what_each_kind_fills() -> None:
    filled = {}
    for kind in ("standard", *STATIC):
        config = resolve_mapping(minimal(), [f"parametrization.kind={kind}"]).config
        o = config.optimizer
        filled[kind] = (
            config.parametrization.residual,
            config.model.norm_placement,
            config.model.norm_gain,
            o.decay_rule,
            o.weight_decay,
            o.clip_grad_norm,
        )
    assert filled == {
        "standard": ("plain", "pre", True, "lr_times_lambda", 0.1, 1.0),
        "mus": ("fixed", "branch_end", True, "fully_decoupled", 1e-4, 1.0),
        "unit_scaling": ("running_mean", "pre", True, "lr_times_lambda", 0.1, 1.0),
        "umup": ("umup", "pre", False, "independent", 1e-4, 0.0),
    }


def test_umup_leaves_projections_into_the_stream_in_high_precision() -> None:
    gemm = resolve_mapping(minimal(), ["precision.recipe=umup", "precision.level=O1"]).config.precision.gemm
    assert gemm.exclude == ("layers.*.attention.out", "layers.*.mlp.down")


def test_a_parametrisation_goes_with_a_recipe_that_measures_scales() -> None:
    config = resolve_mapping(minimal(), ["precision.level=O1", "parametrization.kind=mus"]).config
    assert config.precision.gemm.output.x.scale_source == "current"
    assert config.parametrization.kind == "mus"


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_dumped_static_recipes_load_again(tmp_path: Path, level: str) -> None:
    first = load_config(write(tmp_path, MINIMAL), ["precision.recipe=mus", f"precision.level={level}"]).config
    assert load_config(write(tmp_path, dump_yaml(first), "again.yaml")).config == first


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["precision.recipe=mus", "model.tie_embeddings=true"], ["model.tie_embeddings", "one tensor"]),
        (["parametrization.kind=umup", "model.tie_embeddings=true"], ["model.tie_embeddings"]),
        (
            ["precision.recipe=mus", "precision.level=O1", "parametrization.kind=standard"],
            ["parametrization.kind", "precision.recipe", "current"],
        ),
        (["precision.recipe=mus", "optimizer.weight_decay=0.1"], ["10% of every weight", "1e-4"]),
        (["optimizer.decay_rule=independent"], ["optimizer.weight_decay"]),
        (["parametrization.tau=0.3"], ["parametrization.tau", "residual=fixed"]),
        (["parametrization.residual_mult=2.0"], ["residual=umup"]),
        (["parametrization.base_width=128"], ["kind=mus", "standard"]),
        (["parametrization.constraint=geometric_mean"], ["kind=unit_scaling"]),
        (
            ["precision.recipe=umup", "parametrization.gradient_scale_exponent=3"],
            ["kind is umup (preset precision.recipe=umup)", "kind=standard"],
        ),
        (["precision.profile=paper", "precision.level=O1", "precision.recipe=mus"], ["profile"]),
        (["precision.recipe=mse"], ["precision.recipe", "precision.gemm.fp8=true"]),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    message = message_of(write(tmp_path, MINIMAL), *overrides)
    for word in words:
        assert word in message, message


def test_an_unknown_kind_names_the_legal_ones() -> None:
    with pytest.raises(ConfigError, match="unit_scaling"):
        resolve_mapping(minimal(), ["parametrization.kind=mup"])
