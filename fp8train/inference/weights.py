"""The weights of a checkpoint in a model that only runs forward, in one of two numerics.

``matched``
    What training computes with. Every operand of an output GEMM is cast as the run's plan says: a weight
    once, when it is loaded, an input on the fly by the same rule (its own amax, the checkpoint's delayed
    scale, or the constant). The weights of the FP8 plan exist in FP8 alone, one byte per parameter: training
    may hold more (a BF16 weight beside its FP8 copy, a second copy for backward), forward reads no more. What
    is cast is what training casts: the master weight where training keeps only FP8 (``precision.weights:
    fp8``), else the master rounded to the compute type first. So the codes are training's codes.
``bf16``
    The master weights rounded to BF16 and multiplied in BF16. No operand is FP8, whatever the run did.

A run without FP8 GEMMs has nothing to match but its compute type. Not part of either: FP8 that travels
between ranks outside GEMM operands (``precision.traffic.output`` and ``.pipeline``), for one process has no
such traffic; nor linears that ``precision.guard`` had out of FP8 at that step: here all of the plan are in
it.

A checkpoint holds logical tensors, so the layout that wrote it does not matter here.
"""

from __future__ import annotations

from typing import Literal

import torch

from fp8train.config.kernel_schema import KernelsConfig
from fp8train.config.schema import Config
from fp8train.inference.stored_states import StoredStates
from fp8train.models.build import BuiltModel, build_model
from fp8train.models.connect import connect_linears, make_fp8_parts

Numerics = Literal["matched", "bf16"]


def inference_config(config: Config, compute: Literal["bf16", "fp32"] | None) -> Config:
    """The run's configuration with what a forward-only model changes.

    Args:
        config: the run's.
        compute: the type of all operands, without FP8; None: what training computes with.
    """
    # Every generated token has another length, and nothing is kept for backward: neither setting would help.
    train = config.train.model_copy(update={"compile": "off", "activation_checkpointing": "none"})
    # The device is another one than in training, perhaps; tokens that follow others need a mask.
    kernels = KernelsConfig()
    precision = config.precision
    if compute is not None:
        gemm = precision.gemm.model_copy(update={"fp8": False})
        precision = precision.model_copy(update={"compute": compute, "gemm": gemm})
    return config.model_copy(update={"kernels": kernels, "train": train, "precision": precision})


@torch.no_grad()
def build_trained(states: StoredStates, *, numerics: Numerics, device: torch.device) -> BuiltModel:
    """The model of a checkpoint, ready to run forward: its master weights rounded, and cast to FP8 where they
    exist in FP8 alone.

    Args:
        states: of the checkpoint.
        numerics: see the module's description.
        device: where the model goes.

    Raises:
        CheckpointError: the files are not those of this model.
        ValueError: the device cannot multiply in FP8.
    """
    config = inference_config(states.config, "bf16" if numerics == "bf16" else None)
    built = build_model(config, vocab_size=states.model.vocab_size, device=device, forward_only=True)
    parts = make_fp8_parts(built)
    connect_linears(built, parts)
    if parts.scales is not None:
        states.opened.read(parts.scales.state_tensors())
    loaded = parts.loaded
    for fqn, parameter in built.model.named_parameters():
        values = states.read(fqn)
        if fqn not in loaded:
            parameter.copy_(values)
            continue
        if config.precision.weights == "compute":
            values = values.to(states.model.dtype)
        loaded[fqn].load(values.to(parameter.device))
    built.model.requires_grad_(False)
    return built
