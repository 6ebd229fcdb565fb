"""Transformer Engine's DelayedScaling: FP32 scales, all operands alike."""

from fp8train.config.recipe_values import DELAYED, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="the largest amax of the last 1024 steps, for weights too, in FP32",
    values=same_for_all_operands(DELAYED | {"history": 1024, "reduce": "max"}),
)
