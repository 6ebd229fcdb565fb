"""That Transformer Engine's norms and attention are what we call, and what their fakes check."""

from __future__ import annotations

import ast
import dataclasses
import inspect

from tests.fakes import te_layers_fake
from tests.fakes.transformer_engine_fake import Recorder
from tests.kernels.te.sources import calls, fields, imports, named, parameters, parsed

DPA = "attention/dot_product_attention/dot_product_attention.py"
UTILS = "attention/dot_product_attention/utils.py"


def test_norms_take_these_arguments_in_this_order() -> None:
    """As its own modules call the extension, which has no signature in Python. The words are theirs."""
    ((rms, forward),) = calls("ops/basic/rmsnorm.py", "rmsnorm_fwd")
    quantizer, margin, centred = "next_op_input_quantizer", "sm_margin", "self.zero_centered_gamma"
    last = ["self.eps", "None", quantizer, "TE_DType[dtype]", margin, centred]
    assert forward == ["x", "w", *last] and rms == "(y, _, rstdevs)"
    ((rms, backward),) = calls("ops/basic/rmsnorm.py", "rmsnorm_bwd")
    margin = "self._sm_margins['backward']"
    assert backward == ["dy", "x", "rstdevs", "w", margin, centred] and rms == "(dx, dw)"

    ((layer, forward),) = calls("ops/basic/layer_norm.py", "layernorm_fwd")
    assert forward == ["x", "w", "b", *last] and layer == "(y, means, rstdevs)"
    ((layer, backward),) = calls("ops/basic/layer_norm.py", "layernorm_bwd")
    assert backward == ["dy", "x", "means", "rstdevs", "w", margin, centred] and layer == "(dx, dw, db)"


def test_the_fakes_norms_take_as_many() -> None:
    functions = te_layers_fake.norms(Recorder())["pytorch.cpp_extensions"]
    files = {"rmsnorm": "ops/basic/rmsnorm.py", "layernorm": "ops/basic/layer_norm.py"}
    for name, function in functions.items():
        ((_, arguments),) = calls(files[name.partition("_")[0]], name)
        assert len(inspect.signature(function).parameters) == len(arguments), name


def test_where_the_functions_are() -> None:
    assert "transformer_engine_torch.*" in imports("cpp_extensions/__init__.py")
    assert "transformer_engine.pytorch.attention.DotProductAttention" in imports("__init__.py")
    dtypes = next(
        node.value
        for node in ast.walk(parsed("constants.py"))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TE_DType"
    )
    assert isinstance(dtypes, ast.Dict)
    keys = [ast.unparse(key) for key in dtypes.keys if key is not None]
    assert {"torch.float32", "torch.bfloat16"} <= set(keys)


def test_attention_is_made_with_these_arguments() -> None:
    theirs = parameters(DPA, "DotProductAttention.__init__")
    signature = inspect.signature(te_layers_fake.DotProductAttention.__init__).parameters
    ours = {name: one for name, one in signature.items() if name != "self"}
    positional = [name for name, one in ours.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert list(theirs)[: len(positional)] == positional
    for name, one in ours.items():
        default = None if one.default is inspect.Parameter.empty else repr(one.default)
        assert theirs[name] == default, name
    # What we leave out: no window, cap, sinks, context or tensor parallelism of its own.
    plain = {"window_size": "None", "softcap": "0.0", "softmax_type": "'vanilla'", "cp_group": "None"}
    plain |= {"tp_size": "1", "tp_group": "None", "sequence_parallel": "False"}
    assert {name: theirs[name] for name in plain} == plain


def test_attention_is_called_with_three_tensors() -> None:
    theirs = parameters(DPA, "DotProductAttention.forward")
    assert list(theirs)[:3] == ["query_layer", "key_layer", "value_layer"]
    plain = {"attention_mask": "None", "fp8_output": "False", "core_attention_bias_type": "'no_bias'"}
    assert {name: theirs[name] for name in plain} == plain


def test_determinism_is_read_where_it_is_made() -> None:
    text = ast.unparse(named(parsed(DPA), "DotProductAttention.__init__"))
    assert "self.deterministic =" in text and "torch.are_deterministic_algorithms_enabled()" in text


def test_the_choice_between_kernels() -> None:
    theirs = fields(UTILS, "AttentionParams")
    ours = {field.name for field in dataclasses.fields(te_layers_fake.AttentionParams)}
    assert ours <= theirs.keys()
    plain = {
        "fp8": "False",
        "context_parallel": "False",
        "attention_dropout": "0.0",
        "softmax_type": "'vanilla'",
    }
    assert {name: theirs[name] for name in plain} == plain
    assert list(parameters(UTILS, "get_attention_backend")) == ["attention_params"]
    function = named(parsed(UTILS), "get_attention_backend")
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    tuples = [node for node in returned if isinstance(node, ast.Tuple)]
    first = ["use_flash_attention", "flash_attention_backend", "use_fused_attention"]
    assert tuples and all([ast.unparse(e) for e in one.elts][:3] == first for one in tuples)


def test_layouts_that_it_refuses_or_guesses() -> None:
    """Why each tensor is handed over alone: addresses and offsets decide."""
    text = ast.unparse(named(parsed(UTILS), "get_qkv_layout"))
    assert "untyped_storage().data_ptr()" in text and "storage_offset()" in text
    assert "The provided qkv memory layout is not supported!" in text


def test_the_modules_state_is_not_for_checkpoints() -> None:
    """Its base class adds an entry to every ``state_dict``."""
    base = named(parsed("module/base.py"), "TransformerEngineBaseModule")
    names = {node.name for node in ast.walk(base) if isinstance(node, ast.FunctionDef)}
    assert "get_extra_state" in names
