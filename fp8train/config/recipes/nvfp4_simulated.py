"""NVIDIA 2025, arXiv 2509.25149; Transformer Engine's NVFP4BlockScaling. Simulated."""

from fp8train.config.recipe_values import (
    COMPUTE_WEIGHTS,
    FP32_SCALES,
    Recipe,
    operands,
    same_for_all_operands,
)

RECIPE = Recipe(
    summary="FP4 operands, rounded and then multiplied in high precision: slower than BF16, for research",
    values=same_for_all_operands(FP32_SCALES | {"granularity": "nv_1x16", "hadamard": False}, "e2m1")
    | operands(
        {
            "w": {"granularity": "nv_16x16"},
            "grad_output": {"rounding": "stochastic"},
            "grad_weight.grad_output": {"hadamard": True},
            "grad_weight.x": {"hadamard": True},
        }
    )
    | COMPUTE_WEIGHTS
    | {
        "precision.gemm.keep_x": "bf16",
        "precision.traffic.activations": "compute",
        "precision.traffic.grad_output": "compute",
    },
)
