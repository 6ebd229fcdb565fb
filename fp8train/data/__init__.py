"""Text in, batches of token ids out: Megatron ``.bin``/``.idx`` files, tokenizers, sample order, blends.

Nothing here imports torch before the first batch is asked for, so that worker processes of ``fp8train data
prepare`` start quickly and the data of a run can be checked before it starts.
"""
