"""Unit scaling and u-μP (arXiv 2303.11257 and 2407.17465): unit variance of weights, activations *and*
gradients.

Every operation has a factor α on its output and β on its gradients (:mod:`fp8train.layers.factors`), chosen
for unit-variance inputs. Where the edge into an operation is not a cut edge of the graph, α and β must be
equal (``constraint``: the output's factor, or their geometric mean). Weights, the output head and the loss
are cut edges: each weight's gradient is a constant times the true one, which AdamW and Lion do not notice.
The constants are known (``norm_weight``), so that the norm that is logged and clipped is made of true
gradients, those of effective weights ``α·W``.

With fan_in = K, fan_out = N, B tokens in an optimizer step (of all ranks and micro-batches: a factor that
depended on the local batch would make training depend on the layout), vocabulary V, sequence length S, head
width D and L(a, lo, hi) = hi^a · lo^(1-a)::

    operation            α                                    β
    linear               K^-½                                 input N^-½ (constrained), weight and bias B^-½
    head (u-μP)          K^-1                                 input N^-½, weight B^-½
    head (unit scaling)  K^-½                                 the same
    embedding            1                                    (V / B)^½
    norm gain, bias      1                                    B^-½
    GELU                 L(1/(1+¼/m²), 2, (2/(1-1/π))^½)       L(1/(1+¼/m²), 2, √2)  (constrained)
    SwiGLU               L(1/(1+1/m²), 2, √2)                 the same
    attention (u-μP)     1 / L(1/(1+4D/m²), (ln S / S)^½, 1)  the same; logits m/D
    attention (unit)     see attention_variance               the same; logits m/√D
    cross-entropy        1                                    V / (V-1)^½, of the sum over tokens

(constants of GELU, SwiGLU and u-μP's attention: empirical fits published with u-μP's library, here verified
against simulation in the tests. Biases are added after the multiplication and not multiplied by α; that
library multiplies both.) α of attention comes from the configured sequence length, not from the tensor at
hand: generation token by token computes what training did.

u-μP adds learning rates (AdamW and Lion; H the width, L the number of blocks)::

    embeddings  1/√H        hidden  (K · 2L)^-½        norms and biases in blocks  (2L)^-½        others  1

and residual weights that give embedding, attention and MLP equal shares. Unit scaling alone keeps one
learning rate for all and weighs branches by the running mean, which is the standard decoder with its stream
rescaled.
"""

from __future__ import annotations

from functools import cache
from math import log, pi

import torch

from fp8train.layers.factors import Factors
from fp8train.layers.linear_plan import Alphas
from fp8train.layers.residual import ResidualRule
from fp8train.models.param_spec import ParamSpec, Role
from fp8train.models.parametrization import AttentionFactors, Parametrization


def interpolate(share: float, low: float, high: float) -> float:
    """The geometric mean ``high^share · low^(1 - share)``; L(share, low, high) of the module."""
    return float(high**share * low ** (1 - share))


def gated_factor(mult: float) -> float:
    """1 over the RMS of ``up · silu(mult·gate)/mult`` for unit normal inputs: 1.682 at 1."""
    return interpolate(1 / (1 + 1 / mult**2), 2.0, 2**0.5)


def gelu_factors(mult: float) -> Factors:
    """1 over the standard deviation of ``gelu(mult·x)/mult`` and 1 over the RMS of its derivative."""
    share = 1 / (1 + 0.25 / mult**2)
    return Factors(interpolate(share, 2.0, (2 / (1 - 1 / pi)) ** 0.5), interpolate(share, 2.0, 2**0.5))


@cache
def attention_variance(seq_length: int) -> float:
    """Mean output variance of causal attention with unit normal logits and unit normal, independent values.

    The i-th token's is the expectation of ``sum(p²)`` of a softmax over i logits. With ``w = exp(z)`` and
    ``1/s² = ∫ t·exp(-t·s) dt`` it is ``i · ∫ t · E[w²·exp(-t·w)] · E[exp(-t·w)]^(i-1) dt``: an integral over
    one number, taken on a logarithmic grid, with expectations over z on a plain one. It tends to e/i only
    slowly: 2.64/i at i = 256.
    """
    z = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    log_t = torch.linspace(-16, 10, 801, dtype=torch.float64)
    t, step = log_t.exp(), float(log_t[1] - log_t[0])
    decay = torch.exp(-t[:, None] * z.exp())
    survival = decay @ density
    weight = t.square() * (decay @ (density * (2 * z).exp())) * step  # t², because dt = t · d(log t)
    lengths = torch.arange(1, seq_length + 1, dtype=torch.float64)
    per_token = [float(i) * float((weight * survival ** (float(i) - 1)).sum()) for i in lengths]
    return sum(per_token) / seq_length


class UnitScaling(Parametrization):
    """Unit scaling, and the base class of u-μP."""

    def init_std(self, role: Role) -> float:
        """Standard deviation at step 0: 1 for every matrix."""
        del role
        return 1.0

    def linear(self, fan_in: int, fan_out: int) -> Alphas:
        """Multipliers of a hidden linear's GEMMs. Input gradients share the output's factor, as the stream
        goes around every hidden linear."""
        shared = self._shared(fan_in**-0.5, fan_out**-0.5)
        return Alphas(shared.output, shared.grad, self.vector_grad(), self.vector_grad())

    def head(self) -> Alphas:
        """Multipliers of the output head: a cut edge, so every factor is free; the loss's own factor is in
        it."""
        return self._head(self.model.hidden_size**-0.5)

    def lookup_grad(self, rows: int) -> float:
        """Factor (V / B)^½ on the gradient of a table of V ``rows``, with B tokens in a step."""
        return float((rows / self.batch.tokens) ** 0.5)

    def embedding_sum(self) -> Factors:
        """Factor 1/√2 on the sum of two vectors of unit variance, and on its gradient."""
        return Factors(2**-0.5, 2**-0.5)

    def vector_grad(self) -> float:
        """Factor B^-½ on the gradients of vectors, with B tokens in a step."""
        return float(self.batch.tokens**-0.5)

    def attention(self) -> AttentionFactors:
        """Logits over √D, as in standard attention, and the factor that gives its output unit variance."""
        alpha = attention_variance(self.batch.seq_length) ** -0.5
        return AttentionFactors(
            self.settings.attention_mult / self.model.head_dim**0.5, Factors(alpha, alpha)
        )

    def activation(self) -> Factors:
        """Factors that give the output (and by the constraint the gradient) of GELU or SwiGLU unit
        variance."""
        mult = self.settings.activation_mult
        if self.model.activation == "swiglu":
            return Factors(gated_factor(mult), gated_factor(mult))
        factors = gelu_factors(mult)
        return self._shared(factors.output, factors.grad)

    def residual(self, branch: int) -> ResidualRule:
        """How branch ``branch`` joins the stream; b's backward is delayed to the branch's start."""
        return self._residual(branch, delayed=True)

    def norm_weight(self, spec: ParamSpec) -> float:
        """The true gradient of the effective weight over the stored one, of the sum over tokens: the factors
        β on the way from the loss undone (those that are equal to the operation's α are true), and α."""
        head = self.head()
        if spec.role == "head":
            return self.settings.loss_mult / (self.gradient_scale * head.grad_weight)
        stream = head.output / (self.gradient_scale * head.grad_input) * self._delayed(spec.fqn)
        if spec.role in ("hidden", "residual_out"):
            return stream / self.linear(spec.fan_in, spec.fan_out).grad_weight
        if spec.role == "embedding":
            return stream / self.lookup_grad(self.vocab_size)
        if spec.role == "position":
            return stream / self.lookup_grad(self.model.max_seq_len)
        if spec.fqn.endswith(("query_norm.weight", "key_norm.weight")):
            stream *= self.attention().factors.grad  # multiplies behind them, on the way to qkv
        return stream / self.vector_grad()

    @property
    def gradient_scale(self) -> float:
        """The number of tokens B: the loss is their sum instead of their mean."""
        return float(self.batch.tokens)

    @property
    def true_gradients(self) -> bool:
        """False: each gradient has a constant factor of its own (see the module)."""
        return False

    def _delayed(self, fqn: str) -> float:
        """b of the branch that a parameter is in, which its gradient lacks; 1 outside the blocks."""
        if not fqn.startswith("layers."):
            return 1.0
        _, layer, module, *_ = fqn.split(".")
        return self.residual(2 * int(layer) + module.startswith("mlp")).b

    def _head(self, output: float) -> Alphas:
        # softmax - onehot has RMS (V-1)^½ / V at the start; loss_mult is forward only, as in u-μP's library.
        to_unit = self.vocab_size / (self.vocab_size - 1) ** 0.5
        grad_input = self.vocab_size**-0.5 * to_unit
        return Alphas(output * self.settings.loss_mult, grad_input, self.vector_grad() * to_unit)

    def _shared(self, output: float, grad: float) -> Factors:
        factor = output if self.settings.constraint == "output" else (output * grad) ** 0.5
        return Factors(factor, factor)


class UnitMaximalUpdate(UnitScaling):
    """The unit-scaled maximal update parametrisation, u-μP."""

    def lr_mult(self, fqn: str, role: Role, shape: tuple[int, ...]) -> float:
        """Factor on the learning rate, from the module's table: by width for embeddings, by fan-in and depth
        for hidden matrices, by depth for vectors in blocks."""
        if role in ("embedding", "position"):
            return float(shape[1] ** -0.5)
        depth = (2 * self.model.num_layers) ** -0.5 if fqn.startswith("layers.") else 1.0
        return depth * (shape[1] ** -0.5 if role in ("hidden", "residual_out") else 1.0)

    def head(self) -> Alphas:
        """Multipliers of the output head, 1/fan_in in forward."""
        return self._head(1 / self.model.hidden_size)

    def attention(self) -> AttentionFactors:
        """Logits over D, as queries and keys of a trained model are correlated, and the factor that gives
        attention's output unit variance."""
        mult, head_dim, length = self.settings.attention_mult, self.model.head_dim, self.batch.seq_length
        share = 1 / (1 + 4 * head_dim / mult**2)
        low = (log(length) / length) ** 0.5 if length > 1 else 1.0
        alpha = 1 / interpolate(share, low, 1.0)
        return AttentionFactors(mult / head_dim, Factors(alpha, alpha))
