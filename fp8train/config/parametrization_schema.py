"""The ``parametrization`` section: what depends on width and depth, so that it need not be tuned again.

See :mod:`fp8train.config.schema` for how sections work, :mod:`fp8train.models.parametrization` for the maths.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fp8train.config.section import PositiveFloat, PositiveInt, Section

Kind = Literal["standard", "unit_scaling", "umup", "mus"]


class ParametrizationConfig(Section):
    """Initialisation, multipliers of operations, residual weights, and factors on learning rates and decay.
    Filled by ``kind``, and that by ``precision.recipe`` where a recipe has static scales."""

    kind: Kind = "standard"
    """``standard``: weights of ``model.init_std``, one learning rate. ``mus`` (μnit Scaling): unit-variance
    weights, true gradients. ``unit_scaling``: unit-variance weights, activations and gradients, one learning
    rate. ``umup``: the same with u-μP's learning rates and residual weights."""
    residual: Literal["plain", "fixed", "running_mean", "umup"] = "plain"
    """Weights of stream and branch where a branch joins: ``plain`` 1 and 1; ``fixed`` √(1-τ) and √τ;
    ``running_mean`` √(l/(l+1)) and √(1/(l+1)) at the l-th branch; ``umup`` equal shares of embedding,
    attention and MLP branches at the end."""
    tau: Annotated[float, Field(gt=0, lt=1)] | None = None
    """``residual: fixed`` only: τ; default from the depth: 0.4 up to 4 blocks, 0.3 at 24 to 32, 0.2 at 40,
    0.1 from 100 on."""
    residual_mult: PositiveFloat = 1.0
    """``residual: umup`` only: share of all branches over that of the embedding (α_res)."""
    residual_attention_ratio: PositiveFloat = 1.0
    """``residual: umup`` only: share of attention branches over that of MLP branches (α_res-attn-ratio)."""
    attention_mult: PositiveFloat = 1.0
    """Factor on attention logits (α_attn-softmax)."""
    activation_mult: PositiveFloat = 1.0
    """Factor m inside the MLP's non-linearity, f(m·x)/m (α_ffn-act)."""
    loss_mult: PositiveFloat = 1.0
    """Factor on the logits (α_loss-softmax)."""
    constraint: Literal["output", "geometric_mean"] = "output"
    """``unit_scaling`` and ``umup`` only: factor of an operation whose output and gradient want different
    ones but must share it: that of the output, or their geometric mean."""
    base_width: PositiveInt = 256
    """``mus`` only: width at which hidden matrices get ``optimizer.lr`` itself; elsewhere times
    √(base_width / hidden_size)."""
    gradient_scale_exponent: Annotated[int, Field(ge=-60, le=60)] | None = None
    """Multiply the loss by 2^this before backward and divide the gradients by it afterwards, so that output
    gradients fit E5M2 without scales of their own. Default: ``standard`` 0; ``mus``
    3 + round(log2(tokens of a step · hidden_size)), less half the binades by which SwiGLU's gradients grow
    with depth. Not with ``unit_scaling`` and ``umup``, whose gradients have unit scale already."""
    attention_length: PositiveInt | None = None
    """``unit_scaling`` and ``umup`` only: length of sequences for which attention's output has unit variance;
    its factor is part of the model. Default: ``data.seq_length``. Weights that go on with sequences of
    another length need the one they began with."""
