"""``fp8train config --recipe``: the recipe of a run as three tables, before anything is trained.

A recipe is a parametrisation and a plan of casts. The tables say, for every linear, how each operand of its
three GEMMs is quantised and by what the GEMM multiplies; for every parameter, its initial deviation and its
factors on learning rate and decay; and for every other operation its multipliers. Rows that are the same for
several blocks are shown once, ``layers.0-3.mlp.up``. Read off the model itself (built on the meta device,
without storage), not off the configuration: what is shown is what runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from fp8train.config.linear_names import coverage, reasons_to_skip
from fp8train.config.schema import Config
from fp8train.models.build import outline
from fp8train.models.decoder import Decoder
from fp8train.planning.vocabulary import ASSUMED_VOCABULARY, known_vocabulary
from fp8train.precision.linear_gemms import GEMMS, LinearQuant

Row = tuple[str, ...]
_LAYER = re.compile(r"^layers\.(\d+)\.(.*)$")


def describe_recipe(config: Config) -> str:
    """The tables, with the vocabulary of the configuration or of its dataset.

    Returns:
        A table of linears, one of parameters and one of operations.
    """
    known = known_vocabulary(config)
    model = outline(config, ASSUMED_VOCABULARY if known is None else known)
    gemm = config.precision.gemm
    plan = coverage(reasons_to_skip(config.model, gemm)) if gemm.fp8 else "FP8 GEMMs off"
    header = f"recipe {config.precision.recipe}, parametrization {config.parametrization.kind}; {plan}"
    linears = [("linear", "gemm", "operands", "multiplier"), *_compressed(_linear_rows(model, gemm.value()))]
    parameters = [("parameter", "init", "lr", "decay"), *_compressed(_parameter_rows(model))]
    operations = [("operation", "multiplier", "of the gradient"), *_compressed(_operation_rows(model))]
    text = "\n\n".join([header, *map(_table, (linears, parameters, operations))]) + "\n"
    if known is None:
        text += "\n# no model.vocab_size and no dataset yet: "
        text += f"factors of embedding and head assume {ASSUMED_VOCABULARY}\n"
    return text


def _linear_rows(model: Decoder, quant: LinearQuant | None) -> Iterator[Row]:
    for name, linear in model.linears().items():
        own = quant if model.specs[f"{name}.weight"].in_fp8_plan else None
        for gemm in GEMMS:
            yield name, gemm, _operands(own, gemm), _number(getattr(linear.alphas, gemm))


def _operands(quant: LinearQuant | None, gemm: str) -> str:
    if quant is None or not quant.in_fp8(gemm):
        return "high precision"
    specs = quant.operands()
    return ", ".join(f"{use.rpartition('.')[2]} {specs[use]}" for use in GEMMS[gemm])


def _parameter_rows(model: Decoder) -> Iterator[Row]:
    for fqn, spec in model.specs.items():
        init = f"N(0, {_number(spec.init_std)}²)" if spec.init == "normal" else spec.init
        yield fqn, init, f"× {_number(spec.lr_mult)}", spec.decay or "none"


def _operation_rows(model: Decoder) -> Iterator[Row]:
    rule, config = model.parametrization, model.config
    yield "embedding", "1", _number(rule.lookup_grad(model.vocab_size))
    if config.positions == "learned":
        both = rule.embedding_sum()
        yield "positions", "1", _number(rule.lookup_grad(config.max_seq_len))
        yield "embedding + positions", _number(both.output), _number(both.grad)
    yield "norm gains and biases", "1", _number(rule.vector_grad())
    attention, activation = rule.attention(), rule.activation()
    yield "attention logits", _number(attention.logits_scale), _number(attention.logits_scale)
    yield "attention output", _number(attention.factors.output), _number(attention.factors.grad)
    yield config.activation, _number(activation.output), _number(activation.grad)
    for i in range(config.num_layers):
        for branch, name in ((2 * i, "attention"), (2 * i + 1, "mlp")):
            join = rule.residual(branch)
            where = "at the branch's start" if join.delayed else "at its end"
            yield (
                f"layers.{i}.{name} joins",
                f"{_number(join.a)} stream + {_number(join.b)} branch",
                f"{_number(join.a)} and {_number(join.b)}, {where}",
            )
    head = rule.head()
    yield (
        "head",
        _number(head.output),
        f"{_number(head.grad_input)} input, {_number(head.grad_weight)} weight",
    )
    whose = "divided out before clipping" if rule.true_gradients else "kept: each parameter has its constant"
    yield "mean loss", "1", f"{_number(rule.gradient_scale)} ({whose})"
    if any(rule.norm_weight(spec) != 1 for spec in model.specs.values()):
        yield "clip_grad_norm", "", "of the true gradients of effective weights, multiplier · weight"
    if rule.eps_unit != 1:
        yield "AdamW's eps", "", f"of gradients times {_number(1 / rule.eps_unit)}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _compressed(rows: Iterator[Row]) -> list[Row]:
    """Rows that differ in their block's number alone, as one with the range of numbers."""
    seen: dict[Row, list[int]] = {}
    for name, *cells in rows:
        layer = _LAYER.match(name)
        key = (f"layers.*.{layer[2]}" if layer else name, *cells)
        seen.setdefault(key, []).append(int(layer[1]) if layer else -1)
    return [(name.replace("*", _ranges(layers), 1), *cells) for (name, *cells), layers in seen.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,6`` for 0, 1, 2, 3, 6."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ",".join(parts)


def _table(rows: Sequence[Row]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
