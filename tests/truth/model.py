"""Loss and gradients of a Llama in FP64, from the definition: what training should have computed.

Nothing of fp8train computes here. Weights are *logical* tensors by name, as a checkpoint has them: the rows
of ``attention.qkv`` are ordered by key/value group (its queries, its key, its value), those of ``mlp.up``
alternate between ``unit`` gate rows and ``unit`` up rows. Sources: Touvron et al. 2023 (Llama), Su et al.
2021 (RoPE, pairs i and i + D/2), Zhang & Sennrich 2019 (RMSNorm), Shazeer 2020 (SwiGLU), Ainslie et al. 2023
(grouped queries).

For the static parametrisations (:func:`decoder_truth`) writing the model again would be a second
implementation of their tables. There the truth is our own decoder, in FP64, with plain ``.grad``: no FP8, no
gradient store, no optimizer. ``tests/models/test_mus.py`` and ``test_unit_scaling.py`` hold it against other
implementations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.config.model_schema import ModelConfig
from fp8train.config.schema import Config
from fp8train.models.build import parametrization
from fp8train.models.decoder import Decoder

Weights = Mapping[str, Tensor]
Factors = Mapping[str, float]
"""Factor on the output of a module, by its path."""


@dataclass(frozen=True)
class Truth:
    """Mean loss and its gradients: FP64, by name, of the shape of each weight."""

    loss: float
    gradients: dict[str, Tensor]


def llama_truth(
    weights: Weights, inputs: Tensor, targets: Tensor, model: ModelConfig, *, factors: Factors
) -> Truth:
    """The mean cross-entropy over all targets that are not -100, and its gradients.

    Args:
        weights: logical master weights, any float type.
        inputs: int64 [B, S], the whole global batch.
        targets: the same shape.
        model: sizes.
        factors: on outputs of ``layers.I.attention``, ``layers.I.mlp`` and norms.
    """
    w = {fqn: tensor.double().clone().requires_grad_() for fqn, tensor in weights.items()}
    logits = _logits(w, inputs, model, factors)
    flat, target = logits.flatten(0, 1), targets.flatten()
    kept = target != -100
    scores = flat[kept].log_softmax(-1).gather(1, target[kept][:, None])
    loss = -scores.sum() / kept.sum()
    loss.backward()
    return Truth(float(loss.detach()), {fqn: _gradient(tensor) for fqn, tensor in w.items()})


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _logits(w: Weights, tokens: Tensor, model: ModelConfig, factors: Factors) -> Tensor:
    """[B, S, vocab_size]."""

    def norm(path: str, x: Tensor) -> Tensor:
        inverse_rms = (x.square().mean(-1, keepdim=True) + model.norm_eps).rsqrt()
        return x * inverse_rms * w[f"{path}.weight"] * factors.get(path, 1.0)

    x = w["embedding.weight"][tokens]
    for i in range(model.num_layers):
        layer = f"layers.{i}"
        branch = _attention(w, f"{layer}.attention", norm(f"{layer}.attention_norm", x), model)
        x = x + branch * factors.get(f"{layer}.attention", 1.0)
        branch = _mlp(w, f"{layer}.mlp", norm(f"{layer}.mlp_norm", x), model)
        x = x + branch * factors.get(f"{layer}.mlp", 1.0)
    head = w["embedding.weight" if model.tie_embeddings else "head.weight"]
    return norm("final_norm", x) @ head[: model.vocab_size].T


def _attention(w: Weights, path: str, x: Tensor, model: ModelConfig) -> Tensor:
    (batch, length, _), groups, dim = x.shape, model.num_kv_heads, model.head_dim
    per_group = model.num_heads // groups
    qkv = (x @ w[f"{path}.qkv.weight"].T).view(batch, length, groups, per_group + 2, dim)
    query, key, value = qkv[..., :per_group, :], qkv[..., per_group, :], qkv[..., per_group + 1, :]
    query = _rotate(query.flatten(2, 3), model.rope_theta).unflatten(2, (groups, per_group))
    key = _rotate(key, model.rope_theta)
    scores = torch.einsum("bsgpd,btgd->bgpst", query, key) / math.sqrt(dim)
    hidden_future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(hidden_future, -math.inf).softmax(-1)
    mixed = torch.einsum("bgpst,btgd->bsgpd", shares, value).flatten(2)
    return mixed @ w[f"{path}.out.weight"].T


def _rotate(x: Tensor, theta: float) -> Tensor:
    """x [B, S, heads, D]: pair (i, i + D/2) at position p as a complex number, times e^(i·p·θ^(-2i/D))."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous())
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


def _mlp(w: Weights, path: str, x: Tensor, model: ModelConfig) -> Tensor:
    unit = math.gcd(model.ffn_hidden_size, 128)
    fused = (x @ w[f"{path}.up.weight"].T).unflatten(-1, (-1, 2, unit))
    gate, up = fused[..., 0, :].flatten(-2), fused[..., 1, :].flatten(-2)
    return (gate * torch.sigmoid(gate) * up) @ w[f"{path}.down.weight"].T


def decoder_truth(
    weights: Weights, inputs: Tensor, targets: Tensor, config: Config, *, vocab_size: int, factors: Factors
) -> Truth:
    """As :func:`llama_truth`, by our decoder in FP64 under ``config``'s parametrisation. Its gradients are
    what the optimizer is to read before clipping: constants that belong to them are in."""
    rule = parametrization(config, vocab_size)
    model = Decoder(rule, dtype=torch.float64)
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            parameter.copy_(weights[fqn])
    scale = rule.gradient_scale
    with scaled_outputs(model, factors):
        loss = model(inputs, targets) / (targets != -100).sum()
    (loss * scale).backward()
    unscale = 1 / scale if rule.true_gradients else 1.0
    return Truth(float(loss.detach()), {fqn: _gradient(p) * unscale for fqn, p in model.named_parameters()})


@contextmanager
def scaled_outputs(model: nn.Module, factors: Factors) -> Iterator[None]:
    """Inside, these modules' outputs are multiplied, forward and (hence) backward."""
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output, f=factor: output * f)
        for path, factor in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
