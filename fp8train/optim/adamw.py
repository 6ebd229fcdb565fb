"""AdamW over master weights (Loshchilov & Hutter 2019).

With gradient g (already multiplied by ``grad_multiplier``), step t counted from 1 and learning rate η::

    m <- β1·m + (1-β1)·g            v <- β2·v + (1-β2)·g²
    w <- w - η·λ·w - η · (m/(1-β1^t)) / (sqrt(v/(1-β2^t)) + ε)

``w`` is the master weight: an FP32 copy for BF16 models, the parameter itself otherwise. The update makes one
pass over memory in chunks of at most 2^20 elements, a multiple of 64: temporaries stay in cache and bounded,
and the bits do not depend on how a tensor is cut (vector tails of elementwise kernels can differ).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.models.param_spec import ParamSpec

CHUNK = 1 << 20


@dataclass(frozen=True)
class AdamWSettings:
    """Hyper-parameters; ``lr`` is the peak that the schedule multiplies."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass
class _State:
    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    spec: ParamSpec


class AdamW:
    """Optimizer of a model's parameters, keyed by FQN."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], specs: Mapping[str, ParamSpec], settings: AdamWSettings
    ) -> None:
        """Master weights of BF16 parameters start at zero until :meth:`seed_master` or a checkpoint fills
        them."""
        self.settings = settings
        self._states: dict[str, _State] = {}
        for fqn, parameter in parameters.items():
            wide = parameter.dtype if parameter.dtype in (torch.float32, torch.float64) else torch.float32
            data = parameter.detach()
            master = data if data.dtype == wide else torch.zeros(data.shape, dtype=wide, device=data.device)
            zeros = [torch.zeros(data.shape, dtype=wide, device=data.device) for _ in range(2)]
            self._states[fqn] = _State(parameter, master, zeros[0], zeros[1], specs[fqn])

    def seed_master(self, fqn: str, value: Tensor) -> None:
        """Give a master weight its true initial value (never a rounded one)."""
        self._states[fqn].master.copy_(value)

    def master(self, fqn: str) -> Tensor:
        """The master weight: FP32, or FP64 in FP64 runs."""
        return self._states[fqn].master

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs: ``master/``, ``exp_avg/`` and ``exp_avg_sq/`` + FQN."""
        tensors: dict[str, Tensor] = {}
        for fqn, state in self._states.items():
            tensors[f"master/{fqn}"] = state.master
            tensors[f"exp_avg/{fqn}"] = state.exp_avg
            tensors[f"exp_avg_sq/{fqn}"] = state.exp_avg_sq
        return tensors

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master weights into the model's parameters, rounding to their dtype."""
        for state in self._states.values():
            state.parameter.copy_(state.master)

    @torch.no_grad()
    def step(
        self, grad: Callable[[str], Tensor], *, step: int, lr_factor: float, grad_multiplier: Tensor
    ) -> None:
        """Update every parameter.

        Args:
            grad: gradient by FQN, of the parameter's shape, any float dtype.
            step: 1-based count of updates.
            lr_factor: schedule's factor on the peak rate.
            grad_multiplier: device scalar that multiplies every gradient (clipping).
        """
        for fqn, state in self._states.items():
            self._update(state, grad(fqn), step, lr_factor, grad_multiplier)

    def _update(
        self, state: _State, gradient: Tensor, step: int, lr_factor: float, grad_multiplier: Tensor
    ) -> None:
        s = self.settings
        lr = s.lr * lr_factor * state.spec.lr_mult
        decay = self._decay(state.spec, lr, lr_factor)
        correction1, correction2 = 1 - s.beta1**step, 1 - s.beta2**step
        multiplier = grad_multiplier.to(state.master.dtype)
        flat = [
            t.view(-1)
            for t in (gradient, state.master, state.exp_avg, state.exp_avg_sq, state.parameter.detach())
        ]
        for start in range(0, flat[0].numel(), CHUNK):
            g, w, m, v, parameter = (t[start : start + CHUNK] for t in flat)
            g = g.to(w.dtype) * multiplier
            m.lerp_(g, 1 - s.beta1)
            v.mul_(s.beta2).addcmul_(g, g, value=1 - s.beta2)
            denominator = (v / correction2).sqrt_().add_(s.eps)
            if decay:
                w.mul_(1 - decay)
            w.addcdiv_(m, denominator, value=-lr / correction1)
            if parameter.data_ptr() != w.data_ptr():
                parameter.copy_(w)

    def _decay(self, spec: ParamSpec, lr: float, lr_factor: float) -> float:
        """The share of the weight that this step removes."""
        if spec.decay is None:
            return 0.0
        weight_decay = self.settings.weight_decay
        if spec.decay == "lr_times_lambda":
            return lr * weight_decay
        return weight_decay * lr_factor if spec.decay == "independent" else weight_decay
