"""Transformer Engine's Float8CurrentScaling: FP32 scales, all operands alike."""

from fp8train.config.recipe_values import FP32_SCALES, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="this tensor's amax, in FP32",
    values=same_for_all_operands(FP32_SCALES),
)
