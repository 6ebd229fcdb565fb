"""Absurd numbers are refused at once, by the key that holds them."""

from __future__ import annotations

import time

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.resolve import resolve_mapping
from fp8train.config.threads import threads_from_environment
from tests.config.examples import minimal

ABSURD = {
    "model.num_layers": 10**7,
    "model.hidden_size": 10**9,
    "model.num_heads": 10**12,
    "model.num_kv_heads": 10**12,
    "model.head_dim": 10**9,
    "model.ffn_hidden_size": 10**9,
    "model.vocab_size": 10**12,
    "model.vocab_multiple": 10**12,
    "model.max_seq_len": 10**12,
    "data.seq_length": 10**9,
    "train.steps": 10**18,
    "train.global_batch_size": 10**12,
    "train.micro_batch_size": 10**12,
    "parallel.tp": 10**9,
    "parallel.pp": 10**9,
    "parallel.cp": 10**9,
    "parallel.dp": 10**9,
    "run.threads": 10**6,
}


@pytest.mark.parametrize("key", ABSURD)
@pytest.mark.parametrize("factor", [1, 10**300])
def test_the_key_is_named_at_once(key: str, factor: int) -> None:
    data = minimal()
    section, name = key.split(".")
    data.setdefault(section, {})[name] = ABSURD[key] * factor
    began = time.process_time()
    with pytest.raises(ConfigError, match=rf"{key}\b") as caught:
        resolve_mapping(data)
    assert time.process_time() - began < 2
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("text", ["1000000", "9" * 5000, "0"])
def test_threads_of_the_environment(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a number of threads \(1 to 4096\)"):
        threads_from_environment({"OMP_NUM_THREADS": text})
