"""Transformer Engine's DelayedScaling as Megatron-LM sets it by default: the last step's amax."""

from fp8train.config.recipe_values import DELAYED, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="the amax of the last step, for weights too, in FP32",
    values=same_for_all_operands(DELAYED | {"history": 1, "reduce": "most_recent"}),
)
