"""u-μP (Blake et al. 2024): projections into the residual stream, whose inputs have heavy tails, stay in
BF16.
"""

from fp8train.config.recipe_values import UNSCALED, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="no scales, and BF16 where inputs have heavy tails; fills ``parametrization`` too",
    values=same_for_all_operands(UNSCALED)
    | {
        "precision.gemm.exclude": ("layers.*.attention.out", "layers.*.mlp.down"),
        "parametrization.kind": "umup",
    },
)
