"""Triton launchers of the operations that :mod:`fp8train.kernels` declares.

Imported by name when the first CUDA tensor arrives, so nothing else needs Triton. A launcher has the
signature of its reference and starts kernels through :func:`fp8train.kernels.gpu.launch.launch` alone.
Kernels are built from :mod:`fp8train.kernels.gpu.codes`, which holds what all of them need to agree on:
encoding, decoding, scales, random bits. Two habits give them the reference's bits: sums and products are not
fused, and division is the rounded one (``tl.div_rn``).
"""
