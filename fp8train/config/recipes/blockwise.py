"""DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2; Transformer Engine's Float8BlockScaling."""

from fp8train.config.recipe_values import CURRENT, DIRECTED_OPERANDS, Recipe, operands, same_for_all_operands

RECIPE = Recipe(
    summary="1x128 and 128x128, E4M3 everywhere (DeepSeek-V3)",
    values=same_for_all_operands(CURRENT | {"granularity": "block_1x128"}, "e4m3")
    | DIRECTED_OPERANDS
    | operands({"w": {"granularity": "block_128x128"}}),
)
