"""Tiny models for tests: a valid run configuration around a decoder of a few thousand parameters."""

from __future__ import annotations

from typing import Any

import torch

from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import Config
from fp8train.models.build import BuiltModel, build_model, initialise
from fp8train.models.connect import connect_linears, make_fp8_parts
from fp8train.models.decoder import Decoder

VOCAB_SIZE = 61  # padded to 64: three columns must never win

_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_multiple": 16,
    "max_seq_len": 24,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt"},
    "llama": {"family": "llama", "num_kv_heads": 2},
}


def tiny_config(
    model: dict[str, Any],
    *,
    precision: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    kernels: dict[str, Any] | None = None,
    parametrization: dict[str, Any] | None = None,
) -> Config:
    """A run of a tiny decoder; ``model`` needs ``family`` and overrides the sizes above."""
    settings = {**_SIZES, **model}
    mapping = {
        "run": run or {},
        "kernels": kernels or {},
        "model": settings,
        "parametrization": parametrization or {},
        "data": {"prefix": "unused", "seq_length": settings["max_seq_len"]},
        "precision": {"compute": "fp32", **(precision or {})},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2, **(train or {})},
    }
    return resolve_mapping(mapping).config


def tiny_model(config: Config, *, seed: int = 5, perturb: bool = True) -> Decoder:
    """The initialised decoder of ``config``.

    ``perturb`` adds noise to norms and biases (which start at 1 and 0), so that an error in using them shows.
    """
    built = tiny_built(config)
    connect_linears(built, make_fp8_parts(built))
    fill(built.model, seed=seed, perturb=perturb)
    return built.model


def tiny_built(config: Config) -> BuiltModel:
    """The decoder of ``config`` without values, its linears not connected yet."""
    return build_model(config, vocab_size=VOCAB_SIZE, device=torch.device("cpu"))


def fill(model: Decoder, *, seed: int = 5, perturb: bool = True) -> None:
    """Give a connected decoder the values of :func:`tiny_model`."""
    initialise(model, seed)
    if perturb:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(
                        torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
                    )


def random_tokens(batch: int, length: int, *, seed: int = 3, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """int64 [batch, length], uniform over the vocabulary."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: Decoder, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all targets, by parameter name."""
    model.zero_grad()
    (model(tokens, targets) / targets.numel()).backward()
    found = {}
    for fqn, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{fqn} has no gradient"
        found[fqn] = parameter.grad.clone()
    return found
