"""torchao's recipe rowwise."""

from fp8train.config.recipe_values import CURRENT, DIRECTED_OPERANDS, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="a scale for each contracted vector, E4M3 everywhere",
    values=same_for_all_operands(CURRENT | {"granularity": "row"}, "e4m3")
    | DIRECTED_OPERANDS
    | {"precision.gemm.keep_w": "second_copy"},
)
