"""What a GPU can do at most, and how long a list of launches then takes: a roofline, launch by launch.

A launch takes the longest of three: its bytes at the copy bandwidth, its FLOPs at what large GEMMs (or the
attention kernel) reach, and the shortest time that a kernel takes at all. Launches follow one another; the
host is never late (it is not where launches are few and large). These are ceilings: a prediction that
reality beats is wrong, one that it misses by a tenth is good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["elementwise", "gemm_bf16", "gemm_fp8", "attention"]


@dataclass(frozen=True)
class Gpu:
    """Ceilings of one GPU.

    Attributes:
        bandwidth: bytes per second of a copy, reads and writes together.
        bf16: FLOP per second of large BF16 GEMMs.
        fp8: likewise of FP8 GEMMs with one scale per tensor.
        attention: FLOP per second of causal attention in BF16, head size 128, sequences of 8,192: (forward,
            backward), counting half of the square.
        launch: seconds that the shortest kernel takes.
        peak_bf16: FLOP per second on the data sheet, dense; what MFU is a share of.
        memory: bytes.
        sources: where the numbers are from.
    """

    name: str
    capability: tuple[int, int]
    bandwidth: float
    bf16: float
    fp8: float
    attention: tuple[float, float]
    launch: float
    peak_bf16: float
    memory: float
    sources: str

    def seconds(self, kind: Kind, moved: int, flops: int, launches: int, *, backward: bool = False) -> float:
        """The time of ``launches`` like ones that move and compute this much together."""
        rate = {
            "elementwise": self.bf16,
            "gemm_bf16": self.bf16,
            "gemm_fp8": self.fp8,
            "attention": self.attention[backward],
        }[kind]
        return max(moved / self.bandwidth, flops / rate, launches * self.launch)


_MAMF = "GEMMs: stas00/ml-engineering, maximum achievable matmul FLOPS"
_FA3 = "attention: FlashAttention-3 (arXiv 2407.08608), figures 5 and 6, head size 128, causal, 8k"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H100",
            (9, 0),
            bandwidth=3.0e12,
            bf16=794.5e12,
            fp8=1402.6e12,
            attention=(600e12, 480e12),
            launch=2.5e-6,
            peak_bf16=989e12,
            memory=80e9,
            sources=f"{_MAMF}; copies reach 90 % of 3.35 TB/s; {_FA3}",
        ),
        Gpu(
            "H200",
            (9, 0),
            bandwidth=4.3e12,
            bf16=794.5e12,
            fp8=1453.4e12,
            attention=(600e12, 480e12),
            launch=2.5e-6,
            peak_bf16=989e12,
            memory=141e9,
            sources=f"{_MAMF}; copies reach 90 % of 4.8 TB/s; {_FA3}",
        ),
        Gpu(
            "B200",
            (10, 0),
            bandwidth=7.2e12,
            bf16=1745e12,
            fp8=3432.5e12,
            attention=(1150e12, 900e12),
            launch=2.5e-6,
            peak_bf16=2250e12,
            memory=180e9,
            sources=f"{_MAMF}; copies at 90 % of 8 TB/s; attention scaled from H100 with the GEMMs: a guess",
        ),
    )
}
