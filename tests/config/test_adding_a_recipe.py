"""A recipe that only chooses scales is one file of code and one YAML: nothing else of the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.package_copy import copy_package, run_python

RECIPE = '''
"""Scales that leave eight bits of headroom; of a test."""

from fp8train.config.recipe_values import CURRENT, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="eight bits below this tensor's amax",
    values=same_for_all_operands(CURRENT | {"margin": 8}),
)
'''

YAML = """
base: ../small/llama.yaml
run: {name: small_llama_headroom}
precision: {level: O2, recipe: headroom}
"""

TRAIN = """
from fp8train.config.explain import reference
from fp8train.config.resolve import load_config
assert "``headroom``: eight bits below this tensor's amax." in reference()
gemm = load_config("configs/recipes/headroom.yaml").config.precision.gemm
assert {gemm.output.x.margin, gemm.output.w.margin, gemm.grad_weight.grad_output.margin} == {8}
assert gemm.grad_input.grad_output.format == "e5m2"
from tests.training.tiny import alone, losses, tiny_config
for recipe in ("headroom", "current"):
    found, trainer = losses(tiny_config([f"precision.recipe={recipe}", "precision.level=O2"]), alone(), 2)
    print(found[-1])
"""

ENUMERATED = (
    "tests/config/test_shipped_configs.py::test_every_recipe_has_a_config_that_chooses_it",
    "tests/config/test_presets.py",
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package with the recipe, without its YAML."""
    tests = [path.split("::")[0] for path in ENUMERATED]
    others = ("tests/training/tiny.py", "tests/config/examples.py", "pyproject.toml")
    copy_package(tmp_path, "configs", *others, *tests)
    (tmp_path / "fp8train/config/recipes/headroom.py").write_text(RECIPE.lstrip())
    return tmp_path


def test_a_file_and_a_yaml_add_a_recipe(copy: Path) -> None:
    (copy / "configs/recipes/headroom.yaml").write_text(YAML.lstrip())
    done = run_python(copy, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
    ours, current = map(float, done.stdout.split())
    assert ours != current  # subnormals begin earlier
    assert ours == pytest.approx(current, abs=0.05)


def test_tests_that_enumerate_recipes_see_it(copy: Path) -> None:
    """They pass with the YAML, and miss it."""
    without = run_python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ENUMERATED)
    assert "1 failed" in without.stdout and "Extra items in the right set" in without.stdout, without.stdout
    (copy / "configs/recipes/headroom.yaml").write_text(YAML.lstrip())
    done = run_python(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", *ENUMERATED)
    assert done.returncode == 0, done.stdout
    assert "test_every_recipe_chooses_the_scales_of_all_six_operands[headroom] PASSED" in done.stdout
