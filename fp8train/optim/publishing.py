"""How new weights reach the model: the stored master, rounded into the parameter or cast by a weight target.

What is handed over are values *as stored*, so that the model after a step equals the one made again from a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp8train.kernels.fused_op import fuses
from fp8train.kernels.stored_weight import StoredWeight
from fp8train.numerics.cast import amax_of
from fp8train.optim.agreement import Agreement
from fp8train.optim.host_states import Present
from fp8train.optim.parameter_state import ParameterState
from fp8train.optim.weight_target import WeightTarget


class Publisher:
    """Writes the master weights of a rank into the model.

    Attributes:
        targets: takers of new weights.
    """

    def __init__(self, targets: Mapping[str, WeightTarget], agreement: Agreement) -> None:
        """Args: ``targets``: takers of new weights, also of parameters whose states other ranks keep: those
        are told the amax, not the values; ``agreement``: on scales of whole tensors."""
        self.targets, self._agreement = targets, agreement

    def publish(self, present: Present) -> None:
        """Write the master weights that are on the device: rounded to the parameters' dtype, or to the weight
        targets."""
        self.write_targets({name: self.whole(state) for name, state in present.states.items()}, present)

    def whole(self, state: ParameterState) -> Tensor:
        """Write the stored master into the parameter; returns its amax if it has a target instead."""
        amax = zero_amax(state)
        for start, stop in state.spans():
            amax = self.chunk(state, start, stop, amax)
        return amax

    @staticmethod
    def chunk(state: ParameterState, start: int, stop: int, amax: Tensor) -> Tensor:
        """Copy a chunk of the stored master into the parameter, or take its part in a target's amax."""
        if state.target is not None:
            return torch.maximum(amax, amax_of(state.master.load(start, stop)))
        if state.weight is not None:
            state.weight[start:stop].copy_(state.master.load(start, stop))
        return amax

    def write_targets(self, amaxes: Mapping[str, Tensor], present: Present) -> None:
        """Cast stored masters that are on the device into their weight targets, with one scale on all ranks;
        ``amaxes`` of this rank's parts, by FQN."""
        targets = {fqn: self.targets[fqn] for fqn in present.fqns if fqn in self.targets}
        if not targets:
            return
        agreed = self._agreement.agreed({fqn: amaxes[fqn] for fqn in targets if fqn in amaxes})
        for fqn, target in targets.items():
            state = present.states.get(fqn)
            weight = None if state is None else _stored_weight(state, agreed[fqn])
            if weight is not None and target.take(0, weight):
                continue
            target.begin(agreed[fqn])
            if state is not None:
                for start, stop in state.spans():
                    target.write(start, stop, state.master.load(start, stop).float())
            target.end()


def _stored_weight(state: ParameterState, amax: Tensor) -> StoredWeight | None:
    """The master for a target that takes it at once; None where targets take pieces: on CPUs, and of formats
    that no kernel decodes."""
    stored = state.master.stored()
    if stored is None or not state.numel or not fuses(stored.payload):
        return None
    payload = stored.payload.view(-1, stored.payload.shape[-1])
    return StoredWeight(payload, stored.scale, stored.mantissa, state.master.place.block, amax)


def zero_amax(state: ParameterState) -> Tensor:
    """An amax of nothing yet: FP32 scalar where the states live."""
    return torch.zeros((), dtype=torch.float32, device=state.master.place.device)
