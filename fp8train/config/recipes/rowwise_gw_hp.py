"""torchao's recipe rowwise_with_gw_hp."""

from fp8train.config.recipe_values import CURRENT, DIRECTED_OPERANDS, Recipe, operands, same_for_all_operands

RECIPE = Recipe(
    summary="as ``rowwise``, with weight gradients from unquantised operands",
    values=same_for_all_operands(CURRENT | {"granularity": "row"}, "e4m3")
    | DIRECTED_OPERANDS
    | operands({"grad_input.w": {"granularity": "tensor"}})
    | {
        "precision.gemm.keep_x": "bf16",
        "precision.gemm.keep_w": "second_copy",
        "precision.gemm.grad_weight.fp8": False,
        "precision.traffic.activations": "compute",
        "precision.traffic.grad_output": "compute",
    },
)
