"""Tells a spike of the loss or of the gradient norm from noise.

With the values x_1 .. x_n of the last ``window`` steps that were applied, a new value x is a spike if it is
above all of them and ::

    z = (x - median) / sigma > threshold,   sigma = max(1.4826 · MAD, floor)

where MAD is the median of ``|x_i - median|``; 1.4826 makes it the standard deviation of normal noise (Hampel
1974; Rousseeuw and Croux 1993). Median and MAD forget a spike that was applied: up to half of the window may
be spikes. Window and threshold are those of OLMo-core's ``SkipStepOptimizer``, which takes mean and standard
deviation. The loss is judged as it is, with a floor of 1 % of its median; the norm, which varies by factors,
as its logarithm, with a floor of 0.1: six of those are a factor of 1.8.

Values are the same on all ranks, hence decisions too, and the host has them before the update anyway. A slow
rise is no spike; a lasting jump is one until half of the window lies above it. Before ``min_steps`` are known
the norm alone is judged, and only one that is also 100 times the largest so far is a spike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from fp8train.config.spikes_schema import SpikesConfig

LOSS_FLOOR, NORM_FLOOR = 0.01, 0.1
EARLY_STEPS, EARLY_FACTOR = 4, 100.0
_NORMAL = 1.4826


@dataclass(frozen=True)
class Spike:
    """A value that stands out.

    Attributes:
        step: 1-based.
        quantity: ``loss`` in nats per token or ``grad_norm``.
        value: what it was.
        usual: median of the window.
        sigmas: how far above it.
    """

    step: int
    quantity: str
    value: float
    usual: float
    sigmas: float

    def __str__(self) -> str:
        what = self.quantity.replace("_", " ")
        return f"spike: {what} {self.value:.4g}, usually {self.usual:.4g} ({self.sigmas:.1f} sigma)"

    def numbers(self) -> dict[str, float | str]:
        """The fields of an event."""
        return {"quantity": self.quantity, "value": self.value, "usual": self.usual, "sigmas": self.sigmas}


class SpikeDetector:
    """What is usual, from the steps that were applied.

    Attributes:
        config: thresholds.
    """

    def __init__(self, config: SpikesConfig) -> None:
        self.config = config
        self._loss: deque[float] = deque(maxlen=config.window)
        self._norm: deque[float] = deque(maxlen=config.window)
        self._told = -math.inf

    def judge(self, step: int, *, loss: float, grad_norm: float) -> Spike | None:
        """Whether the finite values of step ``step`` (1-based) are a spike: the worse one. Learns nothing."""
        if len(self._loss) < self.config.min_steps:
            return self._judge_early(step, grad_norm)
        found = [
            self._judge(step, "loss", loss, self._loss),
            self._judge(step, "grad_norm", grad_norm, self._norm),
        ]
        return max(filter(None, found), key=lambda spike: spike.sigmas, default=None)

    def _judge_early(self, step: int, grad_norm: float) -> Spike | None:
        """What is beyond any warm-up, while too little is known for a median."""
        if len(self._norm) < EARLY_STEPS or grad_norm <= EARLY_FACTOR * max(self._norm):
            return None
        sigmas = (_log(grad_norm) - _log(max(self._norm))) / NORM_FLOOR
        return Spike(step, "grad_norm", grad_norm, median(self._norm), sigmas)

    def _judge(self, step: int, quantity: str, value: float, known: Iterable[float]) -> Spike | None:
        """Compares with the largest first: it is all that most steps cost."""
        if value <= max(known):
            return None
        in_logs = quantity == "grad_norm"
        values = [_log(x) for x in known] if in_logs else list(known)
        middle = median(values)
        mad = median(abs(x - middle) for x in values)
        sigma = max(_NORMAL * mad, NORM_FLOOR if in_logs else LOSS_FLOOR * abs(middle))
        sigmas = ((_log(value) if in_logs else value) - middle) / sigma if sigma > 0 else math.inf
        if sigmas <= self.config.threshold:
            return None
        return Spike(step, quantity, value, math.exp(middle) if in_logs else middle, sigmas)

    def learn(self, *, loss: float, grad_norm: float) -> None:
        """Count the values of a step that was applied."""
        self._loss.append(loss)
        self._norm.append(grad_norm)

    def is_told(self, spike: Spike) -> bool:
        """Whether a warning of this spike is due, and not one of the last ``cooldown`` steps told of
        another."""
        if self.config.action == "warn" and spike.step <= self._told + self.config.cooldown:
            return False
        self._told = spike.step
        return True

    def state(self) -> dict[str, Any]:
        """The detector's state for a checkpoint, as JSON values, which keep every bit of a float."""
        told = None if math.isinf(self._told) else self._told
        return {"loss": list(self._loss), "grad_norm": list(self._norm), "told": told}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`; a smaller window keeps the newest values."""
        self._loss = deque(state["loss"], maxlen=self.config.window)
        self._norm = deque(state["grad_norm"], maxlen=self.config.window)
        self._told = -math.inf if state["told"] is None else state["told"]


def _log(x: float) -> float:
    return math.log(max(x, 1e-300))
