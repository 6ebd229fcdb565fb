"""Perez et al. 2023: the other way to choose a bias, by the error it makes."""

from fp8train.config.recipe_values import COMPUTE_WEIGHTS, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="the power of two of least squared error",
    values=same_for_all_operands({"granularity": "tensor", "scale_source": "mse", "rounding": "nearest"})
    | COMPUTE_WEIGHTS,
)
