"""Parametrisations: what initialisation, multipliers, learning rates and decay do as width and depth change.

The decoder asks its parametrisation for numbers and contains none itself. This file has the interface and the
standard parametrisation (Radford et al. 2019), whose every multiplier is 1; :mod:`fp8train.models.mus` and
:mod:`fp8train.models.unit_scaling` are the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import log2

from fp8train.config.model_schema import ModelConfig
from fp8train.config.optimizer_schema import DecayRule
from fp8train.config.parametrization_schema import ParametrizationConfig
from fp8train.layers.factors import Factors
from fp8train.layers.linear_plan import Alphas
from fp8train.layers.residual import ResidualRule
from fp8train.models.param_spec import ParamSpec, Role


@dataclass(frozen=True)
class Batch:
    """What factors that depend on the batch may know of it: the *global* batch, whatever the layout.

    Attributes:
        tokens: target tokens of an optimizer step.
        seq_length: tokens of a sequence, for attention's factor.
    """

    tokens: int
    seq_length: int


@dataclass(frozen=True)
class AttentionFactors:
    """Attention ``output · softmax(logits_scale · q·k) · v``, gradients of q, k and v times ``grad``."""

    logits_scale: float
    factors: Factors = field(default_factory=Factors)


class Parametrization:
    """The standard parametrisation: N(0, init_std²) weights, ``init_std / sqrt(2L)`` into the residual
    stream.

    Attributes:
        model: sizes, ``vocab_size`` filled in.
        vocab_size: the same, never None.
        settings: the ``parametrization`` section.
        batch: of an optimizer step.
    """

    def __init__(self, model: ModelConfig, settings: ParametrizationConfig, batch: Batch) -> None:
        assert model.vocab_size is not None
        self.vocab_size: int = model.vocab_size
        self.model, self.settings, self.batch = model, settings, batch

    def spec(
        self, fqn: str, role: Role, shape: tuple[int, ...], *, decay_rule: DecayRule = "lr_times_lambda"
    ) -> ParamSpec:
        """The spec of a parameter with this name, role and logical shape."""
        matrix = len(shape) == 2
        return ParamSpec(
            fqn=fqn,
            role=role,
            global_shape=shape,
            fan_in=shape[1] if matrix else 0,
            fan_out=shape[0] if matrix else 0,
            init="normal" if matrix else ("ones" if role == "norm" else "zeros"),
            init_std=self.init_std(role) if matrix else 0.0,
            lr_mult=self.lr_mult(fqn, role, shape),
            decay=decay_rule if self.decays(role) else None,
        )

    def init_std(self, role: Role) -> float:
        """Standard deviation of a matrix at step 0."""
        std = self.model.init_std
        return std / (2 * self.model.num_layers) ** 0.5 if role == "residual_out" else std

    def lr_mult(self, fqn: str, role: Role, shape: tuple[int, ...]) -> float:
        """Factor on the learning rate (of AdamW and Lion, whose updates do not scale with gradients)."""
        del fqn, role, shape
        return 1.0

    def decays(self, role: Role) -> bool:
        """Whether weight decay applies to parameters of this role."""
        return role not in ("norm", "bias")

    def linear(self, fan_in: int, fan_out: int) -> Alphas:
        """Multipliers of the GEMMs of a hidden linear with these fans."""
        del fan_in, fan_out
        return Alphas()

    def head(self) -> Alphas:
        """Multipliers of the output head: of the logits, of the gradient of its input, of its weight's."""
        mult = self.settings.loss_mult
        return Alphas(mult, mult, mult)

    def lookup_grad(self, rows: int) -> float:
        """Factor on the gradient of a table of ``rows`` vectors, a token's or a position's embedding."""
        del rows
        return 1.0

    def embedding_sum(self) -> Factors:
        """Factors on the sum of token and position embeddings."""
        return Factors()

    def vector_grad(self) -> float:
        """Factor on gradients of vectors: norm gains and biases."""
        return 1.0

    def attention(self) -> AttentionFactors:
        """Factors of attention, the same in every layer."""
        return AttentionFactors(self.settings.attention_mult / self.model.head_dim**0.5)

    def activation(self) -> Factors:
        """Factors on the MLP's non-linearity ``f(m·x)/m``, m = ``activation_mult``."""
        return Factors()

    def residual(self, branch: int) -> ResidualRule:
        """How branch ``branch`` joins the stream: 0 is the first block's attention, 1 its MLP, 2 the next
        block's attention, and so on."""
        return self._residual(branch, delayed=False)

    @property
    def gradient_scale(self) -> float:
        """Factor S on the mean loss before backward: gradients of activations are S times the true ones."""
        return 2.0 ** (self.settings.gradient_scale_exponent or 0)

    @property
    def true_gradients(self) -> bool:
        """Whether every parameter's gradient is S times the true one, so that dividing by S restores it.
        Otherwise each has a constant of its own, which the optimizer must not see undone."""
        return True

    def norm_weight(self, spec: ParamSpec) -> float:
        """What the norm of this parameter's gradient is multiplied by in the global norm, for logging and
        clipping: it makes it the true gradient's with respect to the *effective* weight.

        That is the matrix that multiplies: α·W, where a parametrisation has W of unit variance and α beside
        it. A model with these matrices and without the α computes the same function and has this gradient,
        so that a threshold means one thing in all parametrisations. ``loss_mult`` and the factors of
        attention, non-linearities and residual joins are the model's, not a weight's, and stay out.
        """
        del spec
        return 1.0

    @property
    def eps_unit(self) -> float:
        """What AdamW's ε is multiplied by to be in the units of the gradients that the optimizer gets."""
        return 1.0

    def _residual(self, branch: int, *, delayed: bool) -> ResidualRule:
        rule = self.settings.residual
        if rule == "plain":
            return ResidualRule()
        if rule == "fixed":
            tau = self.settings.tau or default_tau(self.model.num_layers)
            return ResidualRule((1 - tau) ** 0.5, tau**0.5, delayed)
        if rule == "running_mean":
            count = branch + 2  # what the stream holds after this branch: embedding and branch + 1 branches
            return ResidualRule(((count - 1) / count) ** 0.5, (1 / count) ** 0.5, delayed)
        ratio = equal_shares_ratio(
            branch,
            num_branches=2 * self.model.num_layers,
            residual_mult=self.settings.residual_mult,
            attention_ratio=self.settings.residual_attention_ratio,
        )
        total = (1 + ratio**2) ** 0.5
        return ResidualRule(1 / total, ratio / total, delayed)


_TAU = ((4, 0.4), (24, 0.3), (32, 0.3), (40, 0.2), (100, 0.1))


def default_tau(num_layers: int) -> float:
    """τ of the fixed residual rule, from a coarse table over depth, interpolated in log(depth) and constant
    outside it. The best τ falls with depth and does not depend on width; a coarse choice is enough (Narayan
    et al. 2025, figure on τ)."""
    depth = float(min(max(num_layers, _TAU[0][0]), _TAU[-1][0]))
    for (low, tau_low), (high, tau_high) in pairwise(_TAU):
        if depth <= high:
            share = (log2(depth) - log2(low)) / (log2(high) - log2(low))
            return tau_low + share * (tau_high - tau_low)
    raise AssertionError("depth was clamped to the table")


def equal_shares_ratio(
    branch: int, *, num_branches: int, residual_mult: float, attention_ratio: float
) -> float:
    """Weight of a branch over that of the stream it joins (u-μP, appendix G).

    With both multipliers 1, embedding, all attention branches and all MLP branches have a third each of the
    final stream's variance. ``residual_mult``² is the branches' mean share over the embedding's,
    ``attention_ratio``² attention's over the MLPs'.
    """
    mlp = residual_mult * (2 / (1 + attention_ratio**2)) ** 0.5
    attention = attention_ratio * mlp
    own = attention if branch % 2 == 0 else mlp
    before = (branch + 1) // 2 * attention**2 + branch // 2 * mlp**2
    return own / (num_branches / 2 + before) ** 0.5
