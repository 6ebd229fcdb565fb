"""ZeRO-1 for one process: what it owns, what its optimizer sees, and how new weights reach everyone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.kernels.stored_weight import StoredWeight
from fp8train.layers.fp8_weight import ResidentFp8Weight
from fp8train.models.build import BuiltModel
from fp8train.numerics.cast import cast, uncast
from fp8train.numerics.formats import dtype_of
from fp8train.optim.parameter_state import Region
from fp8train.optim.weight_target import WeightTarget
from fp8train.parallel.zero import Partition, partition
from fp8train.parallel.zero_weights import Matrix, WeightGather
from fp8train.precision.operand_cast import QuantSpec

_TIED = "embedding.weight"


def make_partition(config: Config, processes: Processes, built: BuiltModel) -> Partition | None:
    """Who keeps the optimizer states of this process's part of the model; None without ZeRO, or alone."""
    if config.parallel.zero == "none" or processes.replicas.size == 1:
        return None
    shapes = {fqn: tuple(parameter.shape) for fqn, parameter in built.model.named_parameters()}
    # The first and the last stage hold other tensors beside the embedding, but must cut it alike.
    tied = config.model.tie_embeddings and processes.pp.size > 1
    in_rows = [_TIED] if tied and _TIED in shapes else []
    return partition(shapes, processes.replicas.size, config.parallel.zero_partition, in_rows=in_rows)


@dataclass(frozen=True)
class _FromElement:
    """A weight target seen from one of its rows on."""

    target: WeightTarget
    offset: int

    def begin(self, amax: Tensor) -> None:
        self.target.begin(amax)

    def write(self, start: int, stop: int, values: Tensor) -> None:
        self.target.write(self.offset + start, self.offset + stop, values)

    def end(self) -> None:
        self.target.end()

    def take(self, start: int, weight: StoredWeight) -> bool:
        return self.target.take(self.offset + start, weight)


def make_gather(
    config: Config,
    processes: Processes,
    built: BuiltModel,
    owners: Partition,
    resident: Mapping[str, ResidentFp8Weight],
) -> WeightGather:
    """What brings new weights from :func:`make_partition`'s owners to all ranks, into the parameters and the
    ``resident`` FP8 weights."""
    model = dict(built.model.named_parameters())
    in_fp8 = config.precision.traffic.weights == "fp8"
    return WeightGather(
        [
            matrix
            for fqn, parameter in model.items()
            for matrix in _matrices(fqn, parameter.detach(), resident.get(fqn), in_fp8=in_fp8)
        ],
        owners,
        processes.replicas,
        bucket_bytes=config.precision.gradient.bucket_mib * 2**20,
        purposes={fqn: "weights_fp8_plan" if fqn in resident else "weights" for fqn in model},
    )


class Sharding:
    """This rank's share of the optimizer under ZeRO-1.

    Attributes:
        parameters: memory of what it owns, by FQN.
        regions: place of that in the logical tensors.
        targets: FP8-resident weights, all of them; what it owns starts at its first row.
        gather: brings new weights to all ranks.
    """

    def __init__(
        self,
        processes: Processes,
        built: BuiltModel,
        owners: Partition,
        gather: WeightGather,
        resident: Mapping[str, ResidentFp8Weight],
    ) -> None:
        """Args: ``built``: the model, connected: resident weights have dropped their values; ``owners`` and
        ``gather``: from :func:`make_partition` and :func:`make_gather`."""
        specs, model = built.model.specs, dict(built.model.named_parameters())
        self.gather = gather
        self.parameters: dict[str, Tensor] = {}
        self.regions: dict[str, Region] = {}
        self.targets: dict[str, WeightTarget] = dict(resident)
        for fqn, rows in owners.owned(processes.replicas.rank).items():
            spec = specs[fqn]
            self.parameters[fqn] = model[fqn].detach()[rows.start : rows.stop]
            offset = (spec.offset[0] + rows.start, *spec.offset[1:])
            self.regions[fqn] = Region((len(rows), *spec.local_shape[1:]), offset)
            if fqn in resident:
                self.targets[fqn] = _FromElement(resident[fqn], rows.start * spec.local_shape[1])
        self._weights, self._resident = list(model), frozenset(resident)

    def distribute(self, *, wait: bool) -> None:
        """Send the new weights of what this rank owns, which the optimizer has written. Those in FP8 are
        waited for where they are used (compiled blocks cannot: ``wait`` does it here), the others here."""
        self.gather.start()
        for fqn in self._weights:
            if wait or fqn not in self._resident:
                self.gather.wait(fqn)


def _matrices(
    fqn: str, parameter: Tensor, resident: ResidentFp8Weight | None, *, in_fp8: bool
) -> list[Matrix]:
    """What travels of one parameter: itself, or each of its FP8 copies, as codes or (exactly) as BF16."""
    if resident is None:
        return [Matrix(fqn, parameter)]
    return [
        Matrix(fqn, codes.view(torch.uint8))
        if in_fp8
        else Matrix(
            fqn, codes.view(torch.uint8), partial(_encode, spec, scale), partial(_decode, spec, scale_inv)
        )
        for (codes, scale, scale_inv), spec in zip(resident.copies(), resident.specs(), strict=True)
    ]


def _encode(spec: QuantSpec, scale: Tensor, values: Tensor) -> Tensor:
    return cast(values, spec.format, scale, scale_is_power_of_two=spec.power_of_two).view(torch.uint8)


def _decode(spec: QuantSpec, scale_inv: Tensor, codes: Tensor) -> Tensor:
    return uncast(codes.contiguous().view(dtype_of(spec.format)), scale_inv, torch.bfloat16)
