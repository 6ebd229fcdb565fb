"""Gradients between backward and the optimizer: storage x reduction x receiver.

* *Storage*: how one rank's contributions add up. ``wide_storage`` (FP32, BF16, FP64), ``block_storage`` (FP8
  codes with block scales), ``tensor_storage`` (for FP8 with one scale per tensor), ``integer_storage`` (sums
  on a grid).
* *Reduction*: how the sum over ranks is formed. ``wide_sum`` (FP32, BF16), ``exchange_sum`` (FP8 codes, on
  one level or two), ``shared_scale_sum`` (FP8-LM), ``integer_sum`` (``exact``).
* *Receiver*: who gets it: everyone, or the ZeRO owner of each row (``receivers``).

A ``bucket`` is one storage and one reduction over the places that its receiver gives; ``plan`` chooses them,
``store`` decides when they run. The result is a ``held`` object, which the optimizer reads: it has everything
that its codes were made with, so no later change of scale state can change what they mean. State that lives
from step to step is in ``scales`` (none), ``auto_scales`` (mu) and ``grids`` (``exact``): it is frozen when a
step begins, and moves when the step was applied. ``docs/gradients.md`` draws the way.
"""
