"""μnit Scaling (Narayan et al. 2025, arXiv 2502.05967): FP8 without scales, true gradients, transfer over
width.

==================  ==========  =====================  =========================  =============
parameter           init        forward multiplier     learning rate              decay
==================  ==========  =====================  =========================  =============
embeddings          N(0, 1)     1                      η                          λ
hidden matrices     N(0, 1)     1/√fan_in              η·√(base_width / H)        λ
norm gain           1           --                     η                          λ
output head         N(0, 1)     1/fan_in               η                          λ
==================  ==========  =====================  =========================  =============

Decay is fully decoupled, ``w <- (1-λ)·w``. The multipliers are the GEMMs' own α and the same backward, so
gradients are true. Norms stand at the end of branches and residual joins keep the stream's variance at 1
(√(1-τ) and √τ): with that, every operand of a hidden linear is near unit variance and is cast as it is, to
E4M3.

**Gradients need one scale.** Those of a mean loss are about 1/(tokens·H) in size: nearly all of an output
gradient would round to zero in E5M2 (its smallest number is 2^-16). As gradients are true, one constant S on
the loss serves the whole model: S = 2^3 · 2^round(log2(tokens of a step · H)), from the configuration alone;
with SwiGLU it is smaller by half the growth below. The division by S comes before clipping and the optimizer,
whose ε is in the units of S times the gradient: true gradients of unit-variance weights shrink with width and
batch, so that a fixed ε would damp the updates of wide models. For the same reason the norm that is logged
and clipped is that of the gradients of effective weights, ``α·W``, which are 1/α times as large.

**Llama.** The paper has GELU, LayerNorm and full attention. SwiGLU of unit inputs has RMS 0.6; it is
multiplied by 1.68 (:func:`fp8train.models.unit_scaling.gated_factor`), forward and backward. RMSNorm stands
where LayerNorm would; RoPE and grouped heads change no variance. Position embeddings are added with 1/√2.
SwiGLU is of second degree, so that a branch hands on more gradient than it gets: towards the input, the mean
square grows by about 1 + 1.4·τ a block (7 binades of RMS over 24 blocks, 8 over 100, as measured at step 0 on
sequences of 1,024 tokens). S puts the middle of that in the middle of E5M2.
"""

from __future__ import annotations

from math import log2

from fp8train.layers.factors import Factors
from fp8train.layers.linear_plan import Alphas
from fp8train.models.param_spec import ParamSpec, Role
from fp8train.models.parametrization import Parametrization
from fp8train.models.unit_scaling import gated_factor

_SWIGLU_GAIN = 1.4
"""Mean square of the gradient that leaves a SwiGLU branch over that which entered it, minus 1; measured."""


class MuS(Parametrization):
    """μnit Scaling, as the module describes it."""

    def init_std(self, role: Role) -> float:
        """Standard deviation at step 0: 1 for every matrix."""
        del role
        return 1.0

    def lr_mult(self, fqn: str, role: Role, shape: tuple[int, ...]) -> float:
        """Factor (base_width / H)^½ on the rate of hidden matrices: whatever their own fan-in, they move
        alike."""
        del fqn, shape
        if role not in ("hidden", "residual_out"):
            return 1.0
        return (self.settings.base_width / self.model.hidden_size) ** 0.5

    def decays(self, role: Role) -> bool:
        """Return True: norm gains and biases decay too, the paper exempts nothing."""
        del role
        return True

    def linear(self, fan_in: int, fan_out: int) -> Alphas:
        """The same multiplier 1/√fan_in for the output and both gradients."""
        del fan_out
        alpha = fan_in**-0.5
        return Alphas(alpha, alpha, alpha)

    def head(self) -> Alphas:
        """The same multiplier 1/fan_in for the logits and both gradients, times ``loss_mult``."""
        alpha = self.settings.loss_mult / self.model.hidden_size
        return Alphas(alpha, alpha, alpha)

    def embedding_sum(self) -> Factors:
        """Factor 1/√2 on the sum of token and position embeddings, two vectors of unit variance."""
        return Factors(2**-0.5, 2**-0.5)

    def activation(self) -> Factors:
        """Factors on the non-linearity: none for GELU; those that bring SwiGLU back to unit variance."""
        if self.model.activation != "swiglu":
            return Factors()
        factor = gated_factor(self.settings.activation_mult)
        return Factors(factor, factor)

    @property
    def gradient_scale(self) -> float:
        """The factor S on the loss, a power of two."""
        exponent = self.settings.gradient_scale_exponent
        if exponent is None:
            at_the_output = 3 + round(log2(self.batch.tokens * self.model.hidden_size))
            exponent = at_the_output - round(self._growth / 2)
        return 2.0**exponent

    def norm_weight(self, spec: ParamSpec) -> float:
        """The weight 1 / α of this parameter in the global norm: √fan_in of a hidden matrix, H of the
        head."""
        if spec.role == "head":
            return self.settings.loss_mult / self.head().output
        if spec.role in ("hidden", "residual_out"):
            return 1 / self.linear(spec.fan_in, spec.fan_out).output
        return 1.0

    @property
    def eps_unit(self) -> float:
        """1 / S: ε is added to roots of S times the gradient."""
        return 1 / self.gradient_scale

    @property
    def _growth(self) -> float:
        """Binades by which gradients are larger at the input of the model than at its output, at step 0."""
        if self.model.activation != "swiglu":
            return 0.0
        shares = (self.residual(2 * block + 1).b ** 2 for block in range(self.model.num_layers))
        return sum(log2(1 + _SWIGLU_GAIN * min(share, 1.0)) for share in shares) / 2
