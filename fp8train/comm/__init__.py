"""What processes send each other: groups of ranks, collectives that count their bytes, FP8 reductions.

``processes`` finds out which rank this is and makes the groups; ``collectives`` wraps torch's. Gradients
travel by ``exchange`` (FP8 codes with block scales, sums in FP32) or ``shared_scale`` (FP8-LM's sums in FP8,
with ``fp8_sum``, ``fp8_all_reduce`` and ``auto_scale``). Activations travel by ``sequence_parallel`` and
``context_parallel`` inside a stage, and as ``stage_wire`` says between pipeline stages.
"""
