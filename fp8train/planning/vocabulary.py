"""The vocabulary of a configuration before a run: its own, its dataset's, or one that is assumed."""

from __future__ import annotations

from fp8train.config.schema import Config
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset
from fp8train.data.sidecar import read_sidecar

ASSUMED_VOCABULARY = 32000
"""Where neither the configuration nor a dataset tells."""


def known_vocabulary(config: Config) -> int | None:
    """The vocabulary of the configuration or of its dataset; None if neither tells."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    data = config.data
    prefix = data.prefix if data.prefix is not None else data.blend[0].prefix if data.blend else None
    try:
        sidecar = None if prefix is None else read_sidecar(IndexedDataset(prefix))
    except DataError:
        return None
    return None if sidecar is None else sidecar.vocab_size
