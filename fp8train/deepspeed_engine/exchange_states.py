"""Master weights and moments between DeepSpeed's partitions and the logical tensors of checkpoints.

DeepSpeed flattens parameters of a group into one vector and cuts it into equal parts, one a rank, wherever
the cuts fall. Checkpoints here hold rectangles of logical tensors, in FP32 whatever DeepSpeed's optimizer
stores: a moment that it keeps in FP8 is decoded, and encoding it again gives the same codes' values. One
parameter at a time is whole on every rank, and nothing else is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8train.optim.flat_optimizer import FlatOptimizer

MASTER = "master"


class Partitions:
    """Reads and writes states of whole parameters, wherever DeepSpeed keeps them. All methods are collective:
    every rank calls them for the same parameters in the same order."""

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        ours: FlatOptimizer | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            engine: DeepSpeed's, with a ZeRO optimizer.
            parameters: of the model, by FQN.
            ours: the optimizer, where it is ours; None: one that keeps moments as torch's do.
            device: of this rank, wherever parameters rest.
        """
        self._zero, self._parameters, self._ours = engine.optimizer, parameters, ours
        self._group, self._device = engine.data_parallel_group, device
        self._on_disk = bool(getattr(self._zero, "swap_optimizer", False))
        if ours is not None:
            self._allocate(ours)

    def _allocate(self, ours: FlatOptimizer) -> None:
        """Give every flat vector its moments, before a step would."""
        rank = dist.get_rank(self._group)
        for number, flat in enumerate(self._flats()):
            group = getattr(self._zero, "sub_group_to_group_id", {}).get(number, number)
            formats = ours.param_groups[group]["formats"]
            ours.place(flat, formats, name=f"vector {number}", offset=rank * flat.numel())

    def read(self, fqn: str, role: str, shape: tuple[int, ...]) -> Tensor:
        """One state of a whole parameter: FP32 of this shape, on the device."""
        parameter: Any = self._parameters[fqn]
        if self._on_disk:
            return self._read_from_disk(parameter, role).view(shape)
        full = torch.zeros(math.prod(shape), dtype=torch.float32, device=self._device)
        for flat, start, stop, first in self._fragment(parameter):
            full[first : first + stop - start] = self._load(flat, role, start, stop)
        dist.all_reduce(full, group=self._group)  # fragments do not overlap: a sum with zeros
        return full.view(shape)

    def write(self, fqn: str, role: str, value: Tensor) -> None:
        """Replace one state of a parameter by ``value``, which is whole on every rank."""
        parameter: Any = self._parameters[fqn]
        for flat, start, stop, first in self._fragment(parameter):
            part = value.reshape(-1)[first : first + stop - start].to(torch.float32)
            if self._on_disk:
                self._write_to_disk(parameter, role, part)
            elif role == MASTER:
                flat.data[start:stop].copy_(part)
            elif self._ours is not None:
                self._ours.set_moment(flat, role, start, part.to(flat.device))
            else:
                self._state_of(flat)[role][start:stop].copy_(part)
            if role == MASTER and hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.data[: len(part)].copy_(part)

    def publish(self, updates: int) -> None:
        """End a series of :meth:`write`: the next update is number ``updates + 1``, and the model's weights
        are those of the masters."""
        if self._ours is not None:
            self._ours.finish_moments()
            for flat in self._flats():
                self._ours.set_step(flat, updates)
        if hasattr(self._zero, "update_lp_params"):
            self._zero.update_lp_params()
        elif small := self._zero.persistent_parameters:  # ZeRO-3 leaves these whole on every rank
            small[0].partition(small)  # whole ones would not be gathered again
            small[0].all_gather(small)

    def _flats(self) -> list[Tensor]:
        """This rank's flat vectors of master weights."""
        if hasattr(self._zero, "single_partition_of_fp32_groups"):
            return list(self._zero.single_partition_of_fp32_groups)
        return list(self._zero.fp32_partitioned_groups_flat)

    def _fragment(self, parameter: Any) -> Iterator[tuple[Tensor, int, int, int]]:
        """(flat vector, start, stop in it, first element of the parameter) of what this rank keeps of a
        parameter, if anything."""
        if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts, the last ones filled up with zeros
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            first = dist.get_rank(self._group) * size
            count = min(size, parameter.ds_numel - first)
            if count > 0:
                yield self._flats()[group], offset, offset + count, first
            return
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            flat = self._flats()[mapping.param_group_index]
            yield flat, here.start, here.start + here.numel, there.start

    def _load(self, flat: Tensor, role: str, start: int, stop: int) -> Tensor:
        if role == MASTER:
            return flat.detach()[start:stop]
        if self._ours is not None:
            return self._ours.moment(flat, role, start, stop)
        return self._state_of(flat)[role][start:stop]

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        """DeepSpeed's CPU optimizer makes its moments in its first step; before it they are zero."""
        state = self._zero.optimizer.state[flat]
        if not state:
            state["step"] = 0
            state |= {role: torch.zeros_like(flat) for role in ("exp_avg", "exp_avg_sq")}
        return state

    @staticmethod
    def _read_from_disk(parameter: nn.Parameter, role: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if role == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, role)

    @staticmethod
    def _write_to_disk(parameter: Any, role: str, part: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        whole = torch.zeros(parameter.ds_tensor.ds_numel)
        whole[: len(part)] = part
        if role == MASTER:
            safe_set_local_fp32_param(parameter, whole)
        else:
            safe_set_local_optimizer_state(parameter, whole, role)
