"""COAT (Xi et al. 2024), section 5: GEMM operands by their own amax, other saved activations in groups."""

from fp8train.config.recipe_values import CURRENT, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="as ``current``, with ``activations: fp8``",
    values=same_for_all_operands(CURRENT) | {"precision.activations": "fp8"},
)
