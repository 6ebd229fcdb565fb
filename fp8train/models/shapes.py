"""Names and shapes of a decoder's parameters, by arithmetic on its settings: nothing is built, and torch is
not imported. A test compares them with the decoder's own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from fp8train.config.linear_names import linear_dimensions
from fp8train.config.model_schema import ModelConfig
from fp8train.models.part import ModelPart

Shape = tuple[int, ...]

_SPLIT_ROWS = ("embedding", "head", "attention.qkv", "mlp.up")
_SPLIT_COLUMNS = ("attention.out.weight", "mlp.down.weight")


def split_dim(fqn: str) -> int | None:
    """The dimension along which tensor-parallel ranks cut a parameter; None: each holds all of it."""
    if fqn.endswith(_SPLIT_COLUMNS):
        return 1
    module = fqn.rpartition(".")[0]
    return 0 if any(module == name or module.endswith("." + name) for name in _SPLIT_ROWS) else None


def local_shape(fqn: str, shape: Shape, tp: int) -> Shape:
    """The shape of a tensor-parallel rank's part of a parameter."""
    dim = split_dim(fqn)
    return tuple(size // tp if d == dim else size for d, size in enumerate(shape))


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """The vocabulary rounded up to a multiple of ``multiple``."""
    return -(-vocab_size // multiple) * multiple


def parameter_shapes(model: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """``{fqn: shape}`` of the whole model, in module order.

    Args:
        model: its settings.
        vocab_size: used where ``model.vocab_size`` is not set.
    """
    rows = padded_vocab_size(model.vocab_size or vocab_size, model.vocab_multiple)
    shapes: dict[str, Shape] = {"embedding.weight": (rows, model.hidden_size)}
    if model.positions == "learned":
        shapes["positions.weight"] = (model.max_seq_len, model.hidden_size)
    for layer in range(model.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _block(model)}
    shapes |= {f"final_norm.{name}": shape for name, shape in _norm(model)}
    if not model.tie_embeddings:
        shapes["head.weight"] = (rows, model.hidden_size)
    return shapes


def _block(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    for name, shape in _norm(model):
        yield f"attention_norm.{name}", shape
    if model.qk_norm == "gain":
        yield "attention.query_norm.weight", (model.head_dim,)
        yield "attention.key_norm.weight", (model.head_dim,)
    for name, (inputs, outputs) in linear_dimensions(model).items():
        if name == "mlp.up":
            for norm, shape in _norm(model):
                yield f"mlp_norm.{norm}", shape
        yield f"{name}.weight", (outputs, inputs)
        if model.bias:
            yield f"{name}.bias", (outputs,)


def _norm(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    if model.norm_gain:
        yield "weight", (model.hidden_size,)
        if model.norm == "layernorm" and model.bias:
            yield "bias", (model.hidden_size,)


def held(fqn: str, part: ModelPart, *, tied: bool) -> bool:
    """Whether a process with this part of a model holds a parameter; of a tied embedding the end of the model
    has a copy."""
    first, second = fqn.split(".")[:2]
    if first == "layers":
        number = int(second)
        place = bisect_left(part.layers, number)  # ascending, and there may be thousands
        return place < len(part.layers) and part.layers[place] == number
    return {"embedding": part.begins or (part.ends and tied), "positions": part.begins}.get(first, part.ends)
