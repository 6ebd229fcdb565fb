"""FP8-CSCALE (Perez et al. 2023): constants for each kind of operand."""

from fp8train.config.recipe_values import Recipe, constant, operands, same_for_all_operands

RECIPE = Recipe(
    summary="constants",
    values=same_for_all_operands({"granularity": "tensor", "rounding": "nearest"})
    | operands({"x": constant(4), "w": constant(8), "grad_output": constant(20)}),
)
