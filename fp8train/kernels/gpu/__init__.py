"""Triton launchers of the operations that :mod:`fp8train.kernels` declares.

Imported by name when the first CUDA tensor arrives, so nothing else needs Triton. A launcher has the
signature of its reference and starts kernels through :func:`fp8train.kernels.gpu.launch.launch` alone.
Kernels are built from :mod:`fp8train.kernels.gpu.codes`, which holds what all of them need to agree on:
encoding, decoding, scales, random bits. Formulas that are computed tile by tile are device functions, which
the kernels of :mod:`fp8train.kernels.gpu.elementwise` call.

Two habits give kernels the reference's bits: sums and products are not fused, and division is the rounded one
(``tl.div_rn``) where a rounding to BF16 does not hide the difference. None has been run on a GPU yet.
"""
