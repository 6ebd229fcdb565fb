"""FP8-AMAX (Perez et al. 2023): each tensor's own amax, scales rounded down to powers of two.

The authors leave three bits free for output gradients, because their GEMMs add in FP16; ours add in FP32.
"""

from fp8train.config.recipe_values import CURRENT, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="as ``current``, by its paper's name",
    values=same_for_all_operands(CURRENT),
)
