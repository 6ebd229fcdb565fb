"""The recipes: what ``precision.recipe`` and ``parametrization.kind`` fill.

Data, not code: each recipe is a table of dotted keys that :mod:`fp8train.config.presets` lays under what a
person writes. A recipe sets how the six operands of the GEMMs are cast, and where its scales demand it what
is kept of them and how weights are stored; a static one names the parametrisation that it needs, whose own
table follows. Sources are cited beside each; ``docs/recipes.md`` says when to take which.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp8train.config.nodes import Scalar

Values = Mapping[str, Scalar | tuple[str, ...]]
"""Dotted keys and what they are filled with."""

GEMM_OPERANDS: dict[str, str] = {
    "output.x": "e4m3",
    "output.w": "e4m3",
    "grad_input.grad_output": "e5m2",
    "grad_input.w": "e4m3",
    "grad_weight.grad_output": "e5m2",
    "grad_weight.x": "e4m3",
}
"""The six operand uses and their usual formats: E5M2's range for gradients, E4M3's precision for the rest
(FP8-LM A.1)."""


def _same_for_all_operands(settings: Values, number_format: str | None = None) -> Values:
    """``settings`` for every operand use, each with its usual format unless there is one for all."""
    filled: dict[str, Scalar | tuple[str, ...]] = {}
    for operand, usual in GEMM_OPERANDS.items():
        filled[f"precision.gemm.{operand}.format"] = number_format or usual
        filled |= {f"precision.gemm.{operand}.{key}": value for key, value in settings.items()}
    return filled


_CURRENT: Values = {
    "granularity": "tensor",
    "scale_source": "current",
    "power_of_two": True,
    "margin": 0,
    "rounding": "nearest",
}
_UNSCALED: Values = {**_CURRENT, "scale_source": "constant", "constant_exponent": 0}
_FP32_SCALES: Values = {**_CURRENT, "power_of_two": False}
_DELAYED: Values = {**_FP32_SCALES, "scale_source": "delayed"}


def _operands(settings: Mapping[str, Values]) -> Values:
    """``{operand use or last part of its name: settings}`` as dotted keys."""
    return {
        f"precision.gemm.{use}.{key}": value
        for use in GEMM_OPERANDS
        for name, values in settings.items()
        if name in (use, use.rpartition(".")[2])
        for key, value in values.items()
    }


def _constant(exponent: int) -> Values:
    return {"scale_source": "constant", "constant_exponent": exponent}


_COMPUTE_WEIGHTS: Values = {"precision.weights": "compute", "precision.traffic.weights": "compute"}
"""For scales that the optimizer cannot know before it writes a weight's first piece."""
_DIRECTED_OPERANDS: Values = {"precision.gemm.keep_x": "second_copy", **_COMPUTE_WEIGHTS}
"""Scales along the contracted dimension: x is cast for each of its two GEMMs."""

RECIPES: dict[str, Values] = {
    "current": _same_for_all_operands(_CURRENT),
    # Perez et al. 2023 (FP8-AMAX): each tensor's own amax, scales rounded down to powers of two. They leave
    # three bits free for output gradients, because their GEMMs add in FP16; ours add in FP32.
    "fp8_amax": _same_for_all_operands(_CURRENT),
    # Xi et al. 2024 (COAT), section 5: GEMM operands by their own amax, other saved activations in groups.
    "coat_act": {**_same_for_all_operands(_CURRENT), "precision.activations": "fp8"},
    # Transformer Engine's recipes of these names: FP32 scales, all operands alike.
    "te_current": _same_for_all_operands(_FP32_SCALES),
    "te_delayed": _same_for_all_operands({**_DELAYED, "history": 1024, "reduce": "max"}),
    # As Megatron-LM sets it by default: the last step's amax.
    "te_delayed_recent": _same_for_all_operands({**_DELAYED, "history": 1, "reduce": "most_recent"}),
    # Narayan et al. 2025 (μnit Scaling): every tensor is cast as it is.
    "mus": {**_same_for_all_operands(_UNSCALED), "parametrization.kind": "mus"},
    # Blake et al. 2023.
    "unit_scaling": {**_same_for_all_operands(_UNSCALED), "parametrization.kind": "unit_scaling"},
    # Blake et al. 2024: projections into the residual stream, whose inputs have heavy tails, stay in BF16.
    "umup": {
        **_same_for_all_operands(_UNSCALED),
        "precision.gemm.exclude": ("layers.*.attention.out", "layers.*.mlp.down"),
        "parametrization.kind": "umup",
    },
    # Perez et al. 2023: the other way to choose a bias, by the error it makes.
    "mse": {
        **_same_for_all_operands({"granularity": "tensor", "scale_source": "mse", "rounding": "nearest"}),
        **_COMPUTE_WEIGHTS,
    },
    # Perez et al. 2023 (FP8-CSCALE): constants for each kind of operand.
    "cscale": {
        **_same_for_all_operands({"granularity": "tensor", "rounding": "nearest"}),
        **_operands({"x": _constant(4), "w": _constant(8), "grad_output": _constant(20)}),
    },
    # torchao's recipes rowwise and rowwise_with_gw_hp.
    "rowwise": {
        **_same_for_all_operands({**_CURRENT, "granularity": "row"}, "e4m3"),
        **_DIRECTED_OPERANDS,
        "precision.gemm.keep_w": "second_copy",
    },
    "rowwise_gw_hp": {
        **_same_for_all_operands({**_CURRENT, "granularity": "row"}, "e4m3"),
        **_DIRECTED_OPERANDS,
        **_operands({"grad_input.w": {"granularity": "tensor"}}),
        "precision.gemm.keep_x": "bf16",
        "precision.gemm.keep_w": "second_copy",
        "precision.gemm.grad_weight.fp8": False,
        "precision.traffic.activations": "compute",
        "precision.traffic.grad_output": "compute",
    },
    # DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2; Transformer Engine's Float8BlockScaling.
    "blockwise": {
        **_same_for_all_operands({**_CURRENT, "granularity": "block_1x128"}, "e4m3"),
        **_DIRECTED_OPERANDS,
        **_operands({"w": {"granularity": "block_128x128"}}),
    },
    # Mishra et al. 2025, arXiv 2506.08027; Transformer Engine's MXFP8BlockScaling.
    "mxfp8": {
        **_same_for_all_operands({**_CURRENT, "granularity": "mx_1x32"}, "e4m3"),
        **_DIRECTED_OPERANDS,
        "precision.gemm.keep_w": "second_copy",
    },
    # NVIDIA 2025, arXiv 2509.25149; Transformer Engine's NVFP4BlockScaling. Simulated.
    "nvfp4_simulated": {
        **_same_for_all_operands({**_FP32_SCALES, "granularity": "nv_1x16", "hadamard": False}, "e2m1"),
        **_operands(
            {
                "w": {"granularity": "nv_16x16"},
                "grad_output": {"rounding": "stochastic"},
                "grad_weight.grad_output": {"hadamard": True},
                "grad_weight.x": {"hadamard": True},
            }
        ),
        **_COMPUTE_WEIGHTS,
        "precision.gemm.keep_x": "bf16",
        "precision.traffic.activations": "compute",
        "precision.traffic.grad_output": "compute",
    },
}
_UNTIED: Values = {"model.tie_embeddings": False}
PARAMETRIZATIONS: dict[str, Values] = {
    "standard": {},
    "mus": {
        **_UNTIED,
        "model.norm_placement": "branch_end",
        "parametrization.residual": "fixed",
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_rule": "fully_decoupled",
    },
    "unit_scaling": {
        **_UNTIED,
        "parametrization.residual": "running_mean",
    },
    # The u-μP authors' own runs: no gain in norms, independent decay, no clipping (gradients have unit
    # scale).
    "umup": {
        **_UNTIED,
        "model.norm_gain": False,
        "parametrization.residual": "umup",
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_rule": "independent",
        "optimizer.clip_grad_norm": 0.0,
    },
}
