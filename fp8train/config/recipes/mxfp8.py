"""Mishra et al. 2025, arXiv 2506.08027; Transformer Engine's MXFP8BlockScaling."""

from fp8train.config.recipe_values import CURRENT, DIRECTED_OPERANDS, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="1x32, E4M3 everywhere",
    values=same_for_all_operands(CURRENT | {"granularity": "mx_1x32"}, "e4m3")
    | DIRECTED_OPERANDS
    | {"precision.gemm.keep_w": "second_copy"},
)
