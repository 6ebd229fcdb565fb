r"""Speed: tokens per second, model FLOP/s, and the share of a GPU's peak.

FLOPs of one token, forward and backward (Kaplan et al. 2020; Narayanan et al. 2021, eq. 3; causal attention
at half, since half of the score matrix is never needed)::

    6 · (parameters of the matrix multiplications) + 6 · L · a · s        a = num_heads · head_dim

The output head multiplies and counts, with the vocabulary as it is (padding is not useful work); looking up
an embedding does not. Recomputed activations are not counted either: this is *model* FLOP/s, what MFU is
defined on (Chowdhery et al. 2022, appendix B).

Evaluation and saving are taken out of the time. The peak is the dense tensor-core rate of the vendor's data
sheet; an unknown device gets no MFU rather than a wrong one.
"""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fp8train.config.linear_names import linear_dimensions
from fp8train.config.model_schema import ModelConfig

_ETA_WINDOWS = 10

# Name as torch reports it (NVIDIA data sheets, dense): short name, BF16 and FP8 TFLOP/s.
_PEAKS: tuple[tuple[str, str, float, float | None], ...] = (
    (r"\bGH200\b", "GH200", 989.0, 1979.0),
    (r"\bH200 NVL\b", "H200 NVL", 836.0, 1671.0),
    (r"\bH200\b", "H200 SXM", 989.0, 1979.0),
    (r"\bH100 PCIe\b", "H100 PCIe", 756.0, 1513.0),
    (r"\bH100 NVL\b", "H100 NVL", 835.0, 1671.0),
    (r"\bH[18]00\b.*(HBM3|SXM)", "H100 SXM", 989.0, 1979.0),
    (r"\bA[18]00\b", "A100", 312.0, None),
    (r"\bL40S\b", "L40S", 362.0, 733.0),
    (r"\bL4\b", "L4", 121.0, 242.0),
)


@dataclass(frozen=True)
class Peak:
    """The rate that MFU is a share of."""

    flops: float
    """FLOP/s of one device."""
    name: str
    """For people: ``989 TFLOP/s (H100 SXM, BF16)``."""


def peak_of(device_name: str, *, fp8: bool) -> Peak | None:
    """The dense peak of a GPU by its name; None if it is not known, a slice (MIG) or without FP8 units."""
    if "MIG" in device_name:
        return None
    for pattern, short, bf16, fp8_rate in _PEAKS:
        if re.search(pattern, device_name):
            rate = fp8_rate if fp8 else bf16
            kind = "FP8" if fp8 else "BF16"
            return None if rate is None else Peak(rate * 1e12, f"{rate:g} TFLOP/s ({short}, {kind})")
    return None


def matmul_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Weights that a token is multiplied with: projections, MLP and head, of all layers."""
    layer = sum(inputs * outputs for inputs, outputs in linear_dimensions(model).values())
    return model.num_layers * layer + model.hidden_size * vocab_size


def flops_per_token(model: ModelConfig, seq_length: int, *, vocab_size: int) -> int:
    """Model FLOPs of one training token, forward and backward; see the module's formula.

    Args:
        model: shapes.
        seq_length: s, tokens that attend to each other.
        vocab_size: before padding.
    """
    attention = model.num_heads * model.head_dim
    return 6 * matmul_parameters(model, vocab_size) + 6 * model.num_layers * attention * seq_length


class Throughput:
    """The clock of a run. A window lasts from one :meth:`measure` to the next; :meth:`excluded` stops the
    clock.

    Attributes:
        peak: what MFU refers to; None where it is not known.
    """

    def __init__(
        self,
        model: ModelConfig,
        seq_length: int,
        device: torch.device,
        *,
        vocab_size: int,
        world_size: int,
        fp8: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.peak = peak_of(torch.cuda.get_device_name(device), fp8=fp8) if device.type == "cuda" else None
        self._flops = flops_per_token(model, seq_length, vocab_size=vocab_size)
        self._world_size = world_size
        self._clock = clock
        self._step_seconds: list[float] = []
        self._steps = 0
        self._excluded_total = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a window now, forgetting what passed since the last one."""
        self._began = self._clock()
        self._excluded = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time in here (evaluation, checkpoints) is not training time."""
        began = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - began

    def measure(self, steps: int, tokens: int) -> dict[str, float]:
        """Metrics of the window that ends now, and begin the next. On CUDA, synchronise before.

        Args:
            steps: optimizer steps in the window, at least one.
            tokens: training tokens in them, over all ranks.
        """
        seconds = max(self._clock() - self._began - self._excluded, 1e-9)
        self._excluded_total += self._excluded
        self._steps += steps
        self._step_seconds = [*self._step_seconds, seconds / steps][-_ETA_WINDOWS:]
        self.restart()
        per_second = tokens / seconds
        per_device = per_second / self._world_size
        metrics = {
            "throughput/tokens_per_second": per_second,
            "throughput/tokens_per_second_per_device": per_device,
            "throughput/tflops_per_device": per_device * self._flops / 1e12,
            "time/step_seconds": seconds / steps,
        }
        if self.peak is not None:
            metrics["throughput/mfu"] = per_device * self._flops / self.peak.flops
        return metrics

    def so_far(self, steps: int, tokens: int, steps_left: int) -> tuple[float, float]:
        """Tokens per second of the window until now, and seconds until ``steps_left`` more steps are done
        (from all windows but the oldest, which the first step slows down). Ends no window.

        Args:
            steps: optimizer steps in the window, at least one.
            tokens: training tokens in them, over all ranks.
            steps_left: after these steps.
        """
        seconds = max(self._clock() - self._began - self._excluded, 1e-9)
        times = sorted([*self._step_seconds[1:], seconds / steps])
        excluded = self._excluded_total / self._steps if self._steps else 0.0
        return tokens / seconds, steps_left * (times[len(times) // 2] + excluded)

    def eta_s(self, steps_left: int) -> float:
        """Seconds until ``steps_left`` more steps are done; NaN before the first window.

        The median of the last windows (the first steps are slow), with evaluation and saving as often as so
        far.
        """
        if not self._step_seconds:
            return float("nan")
        median = sorted(self._step_seconds)[len(self._step_seconds) // 2]
        return steps_left * (median + self._excluded_total / self._steps)


def memory_bytes(device: torch.device) -> dict[str, float]:
    """Most memory this process has held: allocated and reserved on CUDA, resident on the CPU.

    Returns:
        ``memory/peak_bytes`` and, on CUDA, ``memory/reserved_bytes``.
    """
    if device.type == "cuda":
        return {
            "memory/peak_bytes": float(torch.cuda.max_memory_allocated(device)),
            "memory/reserved_bytes": float(torch.cuda.max_memory_reserved(device)),
        }
    return {"memory/peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
