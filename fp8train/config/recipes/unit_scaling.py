"""Unit Scaling (Blake et al. 2023)."""

from fp8train.config.recipe_values import UNSCALED, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="no scales; fills ``parametrization`` too",
    values=same_for_all_operands(UNSCALED) | {"parametrization.kind": "unit_scaling"},
)
