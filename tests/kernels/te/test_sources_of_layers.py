"""That Transformer Engine's norms and attention are what we call, and what their fakes check."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest

from tests.fakes import te_layers_fake
from tests.fakes.transformer_engine_fake import Recorder
from tests.kernels.te.sources import INSTALL, Sources, find_sources

DPA = "pytorch.attention.dot_product_attention.dot_product_attention"
UTILS = "pytorch.attention.dot_product_attention.utils"
RMS, LAYER = "pytorch.ops.basic.rmsnorm", "pytorch.ops.basic.layer_norm"


@pytest.fixture(scope="module")
def sources() -> Sources:
    package = find_sources()
    if package is None:
        pytest.skip(f"needs Transformer Engine's sources: {INSTALL}, or FP8TRAIN_TE_SOURCES=FOLDER")
    return Sources(package)


def the_call(sources: Sources, module: str, function: str) -> tuple[str, list[str]]:
    """The one place where a module calls a function: what its result is assigned to, and its arguments."""
    found = [
        (ast.unparse(node.targets[0]), [ast.unparse(argument) for argument in node.value.args])
        for node in ast.walk(sources.module(module))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == function
    ]
    (one,) = found
    return one


def test_norms_take_these_arguments_in_this_order(sources: Sources) -> None:
    """As its own modules call the extension, which has no signature in Python. The words are theirs."""
    centred = "self.zero_centered_gamma"
    last = ["self.eps", "None", "next_op_input_quantizer", "TE_DType[dtype]", "sm_margin", centred]
    assert the_call(sources, RMS, "rmsnorm_fwd") == ("(y, _, rstdevs)", ["x", "w", *last])
    assert the_call(sources, LAYER, "layernorm_fwd") == ("(y, means, rstdevs)", ["x", "w", "b", *last])
    last = ["w", "self._sm_margins['backward']", centred]
    assert the_call(sources, RMS, "rmsnorm_bwd") == ("(dx, dw)", ["dy", "x", "rstdevs", *last])
    backward = ["dy", "x", "means", "rstdevs", *last]
    assert the_call(sources, LAYER, "layernorm_bwd") == ("(dx, dw, db)", backward)


def test_the_fakes_norms_take_as_many(sources: Sources) -> None:
    functions = te_layers_fake.norms(Recorder())["pytorch.cpp_extensions"]
    for name, function in functions.items():
        _, arguments = the_call(sources, RMS if name.startswith("rms") else LAYER, name)
        assert len(inspect.signature(function).parameters) == len(arguments), name


def test_where_the_extension_is(sources: Sources) -> None:
    """``pytorch.cpp_extensions`` hands on all of it, and the dtypes that it is told are in ``constants``."""
    text = ast.unparse(sources.module("pytorch.cpp_extensions"))
    assert "from transformer_engine_torch import *" in text
    _, dtypes = sources.find("pytorch.constants", "TE_DType")
    assert "torch.float32" in ast.unparse(dtypes) and "torch.bfloat16" in ast.unparse(dtypes)


def test_attention_is_made_with_these_arguments(sources: Sources) -> None:
    theirs = sources.call("pytorch", "DotProductAttention")
    ours = dict(inspect.signature(te_layers_fake.DotProductAttention.__init__).parameters)
    del ours["self"]
    kinds = {name: one.kind is not inspect.Parameter.KEYWORD_ONLY for name, one in ours.items()}
    positional = tuple(name for name, by_position in kinds.items() if by_position)
    assert theirs.positional[: len(positional)] == positional
    for name, one in ours.items():
        default = None if one.default is inspect.Parameter.empty else repr(one.default)
        assert theirs.defaults.get(name) == default, name
    # What we leave out: no window, cap, sinks, context or tensor parallelism of its own.
    plain = {"window_size": "None", "softcap": "0.0", "softmax_type": "'vanilla'", "cp_group": "None"}
    plain |= {"tp_size": "1", "tp_group": "None", "sequence_parallel": "False"}
    assert {name: theirs.defaults[name] for name in plain} == plain


def test_attention_is_called_with_three_tensors(sources: Sources) -> None:
    theirs = sources.method("pytorch", "DotProductAttention", "forward")
    assert theirs.positional[:3] == ("query_layer", "key_layer", "value_layer")
    assert theirs.problem(3, frozenset()) is None
    plain = {"attention_mask": "None", "fp8_output": "False", "core_attention_bias_type": "'no_bias'"}
    assert {name: theirs.defaults[name] for name in plain} == plain


def test_determinism_is_read_where_it_is_made(sources: Sources) -> None:
    text = ast.unparse(sources.find(DPA, "DotProductAttention")[1])
    assert "self.deterministic =" in text and "torch.are_deterministic_algorithms_enabled()" in text


def test_the_choice_between_kernels(sources: Sources) -> None:
    theirs = sources.call(UTILS, "AttentionParams")
    ours = {field.name for field in dataclasses.fields(te_layers_fake.AttentionParams)}
    assert ours <= set(theirs.positional)
    plain = {"fp8": "False", "context_parallel": "False", "softmax_type": "'vanilla'"}
    plain |= {"attention_dropout": "0.0"}
    assert {name: theirs.defaults[name] for name in plain} == plain
    assert sources.call(UTILS, "get_attention_backend").positional == ("attention_params",)
    _, function = sources.find(UTILS, "get_attention_backend")
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    tuples = [node for node in returned if isinstance(node, ast.Tuple)]
    first = ["use_flash_attention", "flash_attention_backend", "use_fused_attention"]
    assert tuples and all([ast.unparse(e) for e in one.elts][:3] == first for one in tuples)


def test_layouts_that_it_refuses_or_guesses(sources: Sources) -> None:
    """Why each tensor is handed over alone: addresses and offsets decide."""
    text = ast.unparse(sources.find(UTILS, "get_qkv_layout")[1])
    assert "untyped_storage().data_ptr()" in text and "storage_offset()" in text
    assert "The provided qkv memory layout is not supported!" in text


def test_the_modules_state_is_not_for_checkpoints(sources: Sources) -> None:
    """Its base class adds an entry to every ``state_dict``."""
    assert "get_extra_state" in sources.attributes("pytorch", "DotProductAttention")
