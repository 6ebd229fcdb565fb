"""Reads the states of a checkpoint as numbers, one at a time: for export and inference, which train nothing.

A checkpoint stores states as they are trained: FP8 payloads with scales, FP16, BF16 with a remainder. The
run's configuration says which parameter has which format, the checkpoint how large its blocks are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fp8train.checkpoint.load import open_checkpoint
from fp8train.config.schema import Config
from fp8train.models.build import outline
from fp8train.optim.checkpoint_states import with_stored_blocks
from fp8train.optim.make_storage import make_storage
from fp8train.optim.parameter_state import Region, in_plan, logical_tensors, place_of
from fp8train.precision.state_formats import StateFormat


class StoredStates:
    """The states of a (verified) checkpoint.

    Attributes:
        config: the run's.
        model: as trained, without storage: names, shapes, multipliers and FP8 plan.
        opened: the checkpoint.
        formats: of matrices in the FP8 plan, by role.
    """

    def __init__(self, config: Config, vocab_size: int, checkpoint: Path) -> None:
        self.config, self.model = config, outline(config, vocab_size)
        self.opened = open_checkpoint(checkpoint, group=None, verify="size")
        self.formats = config.stored_formats.formats()
        self._described = self.opened.tensors

    def read(self, fqn: str, role: str = "master") -> Tensor:
        """Read one state of a parameter and decode it: FP32 (FP64 in FP64 runs) of its logical shape, on the
        CPU.

        Raises:
            CheckpointError: it is not there as the run's configuration says.
        """
        spec, fmt = self.model.specs[fqn], StateFormat()
        if in_plan(spec):
            fmt = with_stored_blocks(self.formats[role], self._described, role, fqn)
        region = Region.of(spec)
        wide = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        storage = make_storage(fmt, place_of(spec, region, fmt, torch.device("cpu")), wide=wide)
        self.opened.read({name: tensor for name, tensor, *_ in logical_tensors(role, spec, region, storage)})
        return storage.load(0, storage.place.numel).view(region.shape)
