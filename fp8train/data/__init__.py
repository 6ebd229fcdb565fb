"""Text in, batches of token ids out: Megatron ``.bin``/``.idx`` files, tokenizers, sample order, blends.

Nothing here imports torch except :mod:`fp8train.data.batches`, so that worker processes of ``fp8train data
prepare`` start quickly.
"""
