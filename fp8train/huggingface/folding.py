"""A parametrisation's multipliers, multiplied into the weights.

transformers' decoders know none. With the plain residual (weights 1 and 1) each of ours stands before or
after something linear, and moves into it:

======================================  ===================================================================
attention logits  c instead of 1/√D     query rows (and their bias) times c·√D; RoPE commutes with numbers
linear  α·(W x) + b                     W times α
attention output times f                out's W times f
f(m·x)/m in the MLP                     up's rows (SwiGLU: the gate's) and their bias times m, down's W by m
MLP's non-linearity times f             down's W times f
logits times α                          head; with a tied one the final norm's gain and bias
token and position embeddings times c   both tables
======================================  ===================================================================

Residual weights do not: the stream would have to be rescaled from branch to branch, and norms are invariant
under that only up to their eps. Such a model is refused.

Products are rounded to FP32, by at most 2^-24 of a value; where a multiplier is a power of two or 1 nothing
is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.huggingface.arrangements import Arrangement, GateUp, SeparateQKV
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.models.decoder import Decoder


def check_foldable(decoder: Decoder, where: str) -> None:
    """Refuse a decoder whose residual joins have weights; ``where`` names it in messages.

    Raises:
        HuggingFaceError: they have.
    """
    rule, settings = decoder.parametrization, decoder.parametrization.settings
    joins = [rule.residual(branch) for branch in range(2 * decoder.config.num_layers)]
    if any((join.a, join.b) != (1.0, 1.0) for join in joins):
        raise HuggingFaceError(
            f"{where}: `residual`: {settings.residual} (kind: {settings.kind}) cannot be "
            "exported: it weighs stream and branch at every join, which the architectures written here "
            "do not, and folding the weights away is exact only for norms without eps"
        )


class Multipliers:
    """What each weight is multiplied by on export.

    Args:
        decoder: the run's own, without storage will do.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._rule = decoder, decoder.parametrization

    def of(self, fqn: str, shape: tuple[int, ...]) -> Tensor | float:
        """The factor of a parameter, or one for each row, FP32 [rows, 1] or [rows]; of vectors that the model
        lacks too."""
        module, _, kind = fqn.rpartition(".")
        is_weight = kind == "weight"
        if module in ("embedding", "positions"):
            learned = self._decoder.config.positions == "learned"
            return self._rule.embedding_sum().output if learned else 1.0
        if module in ("head", "final_norm"):
            return self._head(module)
        if module.endswith("norm"):
            return 1.0
        alpha = self._decoder.linears()[module].alphas.output if is_weight else 1.0
        if module.endswith("attention.qkv"):
            return self._query_rows(shape, alpha)
        if module.endswith("mlp.up"):
            return self._inner_rows(shape, alpha)
        if not is_weight:
            return 1.0
        if module.endswith("attention.out"):
            return alpha * self._rule.attention().factors.output
        return alpha * self._rule.activation().output / self._rule.settings.activation_mult

    def _head(self, module: str) -> float:
        tied = self._decoder.config.tie_embeddings
        return self._rule.head().output if (module == "final_norm") == tied else 1.0

    def _query_rows(self, shape: tuple[int, ...], alpha: float) -> Tensor | float:
        model = self._decoder.config
        query = self._rule.attention().logits_scale * model.head_dim**0.5
        if abs(query - 1.0) < 1e-12:  # 1/√D times √D
            return alpha
        return _first_scaled(SeparateQKV(model.num_kv_heads, model.head_dim), shape, alpha, query)

    def _inner_rows(self, shape: tuple[int, ...], alpha: float) -> Tensor | float:
        model, mult = self._decoder.config, self._rule.settings.activation_mult
        if model.activation != "swiglu" or mult == 1.0:
            return alpha * mult
        return _first_scaled(GateUp(model.ffn_hidden_size), shape, alpha, mult)


def _first_scaled(arrangement: Arrangement, shape: tuple[int, ...], alpha: float, mult: float) -> Tensor:
    """``alpha`` for each row, times ``mult`` where it is one of the first of their tensors."""
    rows = torch.full((shape[0], *[1] * (len(shape) - 1)), alpha)
    arrangement.views(rows)[0].mul_(mult)
    return rows
