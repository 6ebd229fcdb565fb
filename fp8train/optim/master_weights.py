"""Storage for the master weights of a checkpoint, without moments: for export and inference, which train
nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fp8train.models.param_spec import ParamSpec
from fp8train.optim.checkpoint_states import Described, with_stored_blocks
from fp8train.optim.make_storage import make_storage
from fp8train.optim.parameter_state import Region, in_plan, place_of
from fp8train.optim.state_storage import Storage
from fp8train.precision.state_formats import StateFormat


class MasterWeights:
    """Storages as the optimizer's, for the role ``master`` only; on the CPU."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        specs: Mapping[str, ParamSpec],
        master: StateFormat,
        stored: Described,
    ) -> None:
        """Args: ``parameters``, ``specs``: the model's; ``master``: format of matrices in the FP8 plan;
        ``stored``: what the checkpoint holds, which decides the size of blocks."""
        self._storages: dict[str, Storage] = {}
        for fqn, parameter in parameters.items():
            spec = specs[fqn]
            fmt = with_stored_blocks(master, stored, "master", fqn) if in_plan(spec) else StateFormat()
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            place = place_of(spec, Region.of(spec), fmt, torch.device("cpu"))
            self._storages[fqn] = make_storage(fmt, place, wide=wide)

    def state_tensors(self) -> dict[str, Tensor]:
        """What to load from a checkpoint, in place: ``master/FQN`` with the suffixes of its format."""
        return {
            f"master/{fqn}{suffix}": tensor
            for fqn, storage in self._storages.items()
            for suffix, tensor in storage.tensors().items()
        }

    def values(self, fqn: str) -> Tensor:
        """A weight as FP32 (FP64 in FP64 runs), of the parameter's shape, on the CPU."""
        storage = self._storages[fqn]
        return storage.load(0, storage.place.numel).view(storage.place.shape)
