"""Reads a run's master weights in FP32, one parameter at a time, and builds a decoder that computes in FP32
with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fp8train.checkpoint.load import open_checkpoint
from fp8train.config.schema import Config
from fp8train.inference.load import TrainedRun
from fp8train.inference.weights import inference_config
from fp8train.models.build import build_model, outline
from fp8train.models.decoder import Decoder
from fp8train.optim.master_weights import MasterWeights


class MasterReader:
    """Reads the master weights of a (verified) checkpoint, one parameter at a time.

    Attributes:
        decoder: the model as trained, without storage: names, shapes, multipliers and FP8 plan.
    """

    def __init__(self, run: TrainedRun) -> None:
        self._opened = open_checkpoint(run.path, group=None, verify="size")
        self.decoder = outline(run.config, run.vocab_size)
        self._parameters = dict(self.decoder.named_parameters())
        self._stored = self._opened.tensors
        self._format = run.config.precision.state.master.value()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of all parameters, by name."""
        return {fqn: tuple(parameter.shape) for fqn, parameter in self._parameters.items()}

    def read(self, fqn: str) -> Tensor:
        """Read one master weight and decode it: FP32 on the CPU.

        Raises:
            CheckpointError: it is not there as the run's configuration says.
        """
        masters = MasterWeights({fqn: self._parameters[fqn]}, self.decoder.specs, self._format, self._stored)
        self._opened.read(masters.state_tensors())
        return masters.values(fqn).float()


@torch.no_grad()
def decoder_in_fp32(config: Config, vocab_size: int, value: Callable[[str], Tensor]) -> Decoder:
    """The run's model in FP32 on the CPU, without FP8.

    Args:
        config: the run's.
        vocab_size: tokens that the model knows.
        value: gives each parameter by its name, FP32.
    """
    plain = inference_config(config, "bf16")
    precision = plain.precision.model_copy(update={"compute": "fp32"})
    plain = plain.model_copy(update={"precision": precision})
    model = build_model(plain, vocab_size=vocab_size, device=torch.device("cpu")).model
    for fqn, parameter in model.named_parameters():
        parameter.copy_(value(fqn))
    return model.requires_grad_(False)
