"""Every name that we use of Transformer Engine, and every call that we make to it, against its own sources.

Calls are found in our modules (``te("pytorch.tensor").Float8Quantizer(...)``, directly or through a
variable), so that one that is added is checked too. Norms alone call its C++ extension, which is not in the
wheel: :mod:`tests.kernels.te.test_sources_of_layers` compares them with TE's own calls.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels.te.sources import INSTALL, Sources, find_sources

OURS = Path(__file__).parents[3] / "fp8train" / "kernels" / "te"
FILES = ("gemm.py", "quantize.py", "native.py", "attention.py")


@pytest.fixture(scope="module")
def sources() -> Sources:
    package = find_sources()
    if package is None:
        pytest.skip(f"needs Transformer Engine's sources: {INSTALL}, or FP8TRAIN_TE_SOURCES=FOLDER")
    return Sources(package)


@dataclass(frozen=True)
class Use:
    """One ``te(module).name``; ``call`` None: not called, as for an enumeration."""

    file: str
    line: int
    module: str
    name: str
    call: tuple[int, frozenset[str]] | None


def _module_of(node: ast.expr, variables: dict[str, str]) -> str | None:
    """The module that an expression is: ``te("x")``, or a variable that was assigned that."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "te":
        return ast.literal_eval(node.args[0])
    return variables.get(node.id) if isinstance(node, ast.Name) else None


def uses(file: str, text: str) -> list[Use]:
    """All uses in a file of ours."""
    found = []
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        variables: dict[str, str] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=True))
                    for name, value in pairs:
                        if isinstance(name, ast.Name) and (module := _module_of(value, {})) is not None:
                            variables[name.id] = module
        called = {id(node.func): node for node in ast.walk(function) if isinstance(node, ast.Call)}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and (module := _module_of(node.value, variables)) is not None:
                call = None
                if (made := called.get(id(node))) is not None:
                    names = [keyword.arg for keyword in made.keywords]
                    assert None not in names, f"{file}:{made.lineno}: ** hides what is passed on"
                    call = len(made.args), frozenset(name for name in names if name is not None)
                found.append(Use(file, node.lineno, module, node.attr, call))
    return found


def all_uses() -> list[Use]:
    return [use for file in FILES for use in uses(file, (OURS / file).read_text())]


def test_uses_are_found() -> None:
    names = {use.name for use in all_uses()}
    assert names >= {
        *("general_gemm", "Float8TensorStorage", "MXFP8TensorStorage", "Float8BlockwiseQTensorStorage"),
        *("Float8Quantizer", "Float8CurrentScalingQuantizer", "Float8BlockQuantizer", "MXFP8Quantizer"),
        *("TE_DType", "Linear", "autocast", "Format", "QParams"),
        *("DotProductAttention", "AttentionParams", "get_attention_backend"),
    }


def test_every_name_and_call(sources: Sources) -> None:
    problems = []
    for use in all_uses():
        sources.find(use.module, use.name)
        if use.call is not None:
            problem = sources.call(use.module, use.name).problem(*use.call)
            if problem is not None:
                problems.append(f"{use.file}:{use.line}: {use.name}: {problem}")
    assert problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('def f():\n    te("pytorch.cpp_extensions").general_gemm(1, 2, layot="TN")', "unknown ['layot']"),
        ('def f():\n    c = te("pytorch.tensor")\n    c.MXFP8TensorStorage(fp8_dtype=1)', "missing"),
        ('def f():\n    te("pytorch.tensor").Float8Quantizer(1, 2, 3, 4, 5)', "5 positional arguments"),
    ],
)
def test_a_wrong_call_would_be_seen(sources: Sources, text: str, problem: str) -> None:
    (use,) = uses("x.py", text)
    assert use.call is not None
    found = sources.call(use.module, use.name).problem(*use.call)
    assert found is not None and problem in found


DEFAULTS = {
    ("pytorch.cpp_extensions", "general_gemm"): {
        "quantization_params": "None",
        "gelu": "False",
        "accumulate": "False",
        "beta": "None",
        "out": "None",
        "bias": "None",
        "grad": "False",
        "ub": "None",
    },
    ("pytorch.tensor", "Float8TensorStorage"): {"data_transpose": "None", "quantizer": "None"},
    ("pytorch.tensor", "Float8CurrentScalingQuantizer"): {
        "with_amax_reduction": "False",
        "amax_reduction_group": "None",
    },
    ("pytorch", "Linear"): {
        "sequence_parallel": "False",
        "fuse_wgrad_accumulation": "False",
        "tp_size": "1",
        "parallel_mode": "None",
        "return_bias": "False",
    },
}


@pytest.mark.parametrize("place", DEFAULTS, ids=str)
def test_defaults_that_we_rely_on(sources: Sources, place: tuple[str, str]) -> None:
    found = sources.call(*place).defaults
    assert {name: found[name] for name in DEFAULTS[place]} == DEFAULTS[place]


def test_order_of_what_we_pass_by_position(sources: Sources) -> None:
    assert sources.call("pytorch.cpp_extensions", "general_gemm").positional[:2] == ("A", "B")
    assert sources.call("pytorch.tensor", "Float8Quantizer").positional == ("scale", "amax", "fp8_dtype")
    current = sources.call("pytorch.tensor", "Float8CurrentScalingQuantizer")
    assert current.positional == ("fp8_dtype", "device")
    for name in ("Float8BlockQuantizer", "MXFP8Quantizer"):
        assert sources.call("pytorch.tensor", name).positional == ("fp8_dtype",)
    assert sources.call("pytorch", "Linear").positional[:2] == ("in_features", "out_features")


ATTRIBUTES = {
    "Float8TensorStorage": {"_data", "_transpose", "_scale_inv", "device"},
    "Float8BlockwiseQTensorStorage": {
        *("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv", "device"),
    },
    "MXFP8TensorStorage": {
        *("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv", "device"),
    },
    "Float8Quantizer": {"scale", "amax", "internal", "quantize"},
    "Float8CurrentScalingQuantizer": {"internal", "quantize"},
    "Float8BlockQuantizer": {"internal", "quantize"},
    "MXFP8Quantizer": {"internal", "quantize"},
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(sources: Sources, name: str) -> None:
    missing = ATTRIBUTES[name] - sources.attributes("pytorch.tensor", name)
    assert missing == set()


def test_attributes_of_storages_that_we_read_are_those() -> None:
    """``made._x`` in our casts, and nothing that is not checked above."""
    tree = ast.parse((OURS / "quantize.py").read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "made"
    }
    assert read <= set().union(*ATTRIBUTES.values())
    assert read >= {"_data", "_transpose", "_scale_inv", "_rowwise_data", "_columnwise_scale_inv", "internal"}


def test_quantize_takes_the_tensor_first(sources: Sources) -> None:
    for name in ("Float8Quantizer", "MXFP8Quantizer"):
        found = sources.method("pytorch.tensor", name, "quantize")
        assert found.positional == ("tensor",)
        assert found.problem(1, frozenset()) is None


def test_a_module_is_called_with_the_microbatch(sources: Sources) -> None:
    found = sources.method("pytorch", "Linear", "forward")
    assert found.positional[0] == "inp"
    assert found.problem(1, frozenset({"is_first_microbatch"})) is None


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("DelayedScaling", {"fp8_format", "amax_history_len", "amax_compute_algo", "margin"}),
        ("Float8CurrentScaling", {"fp8_format", "use_power_2_scales"}),
        ("Float8BlockScaling", {"fp8_format", "use_f32_scales"}),
        ("MXFP8BlockScaling", {"fp8_format"}),
        ("NVFP4BlockScaling", set()),
    ],
)
def test_recipes(sources: Sources, recipe: str, options: set[str]) -> None:
    """Their options, by name: :func:`fp8train.kernels.te.native.make_recipe` passes them on from a table."""
    assert sources.call("common.recipe", recipe).problem(0, frozenset(options)) is None
    if options >= {"use_power_2_scales"} or options >= {"use_f32_scales"}:
        names = {"fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"}
        assert names <= sources.attributes("common.recipe", recipe)


def test_codes_are_what_its_types_say(sources: Sources) -> None:
    _, node = sources.find("pytorch.constants", "TE_DType")
    text = ast.unparse(node)
    assert "torch.float8_e4m3fn" in text and "torch.float8_e5m2" in text


def test_formats(sources: Sources) -> None:
    assert {"E4M3", "HYBRID"} <= sources.attributes("common.recipe", "Format")


def test_its_gemm_reads_what_we_fill(sources: Sources) -> None:
    """The layout that we ask for reads row-wise data of both operands, says ``general_gemm`` itself."""
    _, node = sources.find("pytorch.cpp_extensions", "general_gemm")
    text = ast.unparse(node)
    assert "transa = layout[0] == 'T'" in text and "transb = layout[1] == 'T'" in text
    assert "use_split_accumulator = True" in text, "blocks always add in FP32"
