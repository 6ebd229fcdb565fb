"""What recipes start from: each tensor's own amax, a power of two."""

from fp8train.config.recipe_values import CURRENT, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="this tensor's amax, a power of two",
    values=same_for_all_operands(CURRENT),
)
