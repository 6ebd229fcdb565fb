"""Packages that a run may use beside this one, and none needs: which, whether they are here, what they do.

Nothing here imports them, or torch: a run that asks for one that is absent, too old or unable on its GPU is
refused before it begins. The code that calls a package is in one place each: :mod:`fp8train.kernels.te`,
:mod:`fp8train.kernels.apex` and :mod:`fp8train.deepspeed_engine`.
"""
