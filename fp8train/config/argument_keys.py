"""The keys that set the arguments of lower packages: `seq_length` of a dataset is ``data.seq_length``.

Data, checkpoints and models are used without a configuration too, so what these packages tell a person speaks
of their own arguments, in backticks. Whoever took the arguments from a configuration has them told as keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fp8train.config.errors import UserError

_NAMED = """
    checkpoint.accept_changes checkpoint.init_from checkpoint.keep_last checkpoint.resume data.blend
    data.kind data.mask_end_of_document data.seq_length data.split data.tokenizer model.activation
    model.head_dim model.max_seq_len model.norm_placement model.num_kv_heads model.positions model.qk_norm
    model.vocab_size parametrization.residual precision.gemm.fp8 kernels.attention kernels.gemm
    kernels.multi_tensor kernels.norm kernels.optimizer run.device train.global_batch_size
    train.micro_batch_size
"""
KEYS = {key.rpartition(".")[2]: key for key in _NAMED.split()}
"""Argument -> key, which ends with the same word."""

_ARGUMENT = re.compile(r"`(\w+)`")


def with_keys(text: str) -> str:
    """The text with keys in the place of arguments in backticks."""
    return _ARGUMENT.sub(lambda found: KEYS.get(found[1], found[0]), text)


@contextmanager
def naming_keys() -> Iterator[None]:
    """Make a :class:`UserError` that leaves the block, or the decorated function, name keys."""
    try:
        yield
    except UserError as error:
        error.args = (with_keys(str(error)), *error.args[1:])
        raise
