"""The description of one Hugging Face architecture: its settings, its tensors and how they lie in ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fp8train.config.model_schema import ModelConfig
from fp8train.huggingface.arrangements import SAME, Arrangement, Vocabulary
from fp8train.huggingface.config_json import ConfigJson


@dataclass(frozen=True)
class TensorMap:
    """Where one of our parameters lies in a Hugging Face file.

    Attributes:
        ours: its name in the decoder.
        theirs: names of the tensors that hold it.
        arrangement: how.
    """

    ours: str
    theirs: tuple[str, ...]
    arrangement: Arrangement = SAME


@dataclass(frozen=True)
class Architecture:
    """What is known of one architecture of transformers.

    Attributes:
        name: its class, as in ``architectures`` of a config.json.
        model_types: values of ``model_type`` that are read with it; the first is written.
        base_prefix: of the names of everything but the head; files of the bare model lack it.
        buffers: ends of names that older versions saved beside the weights and that hold nothing learned.
        aliases: other names of a tensor, by the name used in ``tensors``.
        linears: its matrices are ``nn.Linear`` arranged as FP8 formats of inference engines expect.
        settings: its config.json -> the keys of our ``model`` section.
        config: our settings -> the keys of its config.json.
        head: its name of the output head's weight.
        tensors: our settings -> which tensors are which: all that a file with these settings must hold. Ours
            may lack some of the vectors (biases, gains); they are then exported as zeros and ones.
    """

    name: str
    model_types: tuple[str, ...]
    base_prefix: str
    buffers: tuple[str, ...]
    aliases: dict[str, str]
    linears: bool
    head: str
    settings: Callable[[ConfigJson], dict[str, Any]]
    config: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig], Sequence[TensorMap]]


def vectors(ours: str, *theirs: str, arrangement: Arrangement = SAME, bias: bool = True) -> list[TensorMap]:
    """Weight and, with ``bias``, bias of a module, by module path; perhaps several modules of theirs."""
    return [
        TensorMap(f"{ours}.{kind}", tuple(f"{module}.{kind}" for module in theirs), arrangement)
        for kind in (("weight", "bias") if bias else ("weight",))
    ]


def embeddings(model: ModelConfig, embedding: str, head: str) -> list[TensorMap]:
    """The token embedding and, where it is another, the output head."""
    assert model.vocab_size is not None
    tokens = Vocabulary(model.vocab_size)
    maps = [TensorMap("embedding.weight", (embedding,), tokens), TensorMap("head.weight", (head,), tokens)]
    return maps[:1] if model.tie_embeddings else maps
