"""μnit Scaling (Narayan et al. 2025): every tensor is cast as it is."""

from fp8train.config.recipe_values import UNSCALED, Recipe, same_for_all_operands

RECIPE = Recipe(
    summary="no scales; fills ``parametrization`` too, which keeps tensors near unit variance",
    values=same_for_all_operands(UNSCALED) | {"parametrization.kind": "mus"},
)
