"""Which packages may name keys of the configuration, and how arguments become keys."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8train.config.argument_keys import KEYS, naming_keys, with_keys
from fp8train.config.errors import UserError
from fp8train.config.keys import key_table
from fp8train.data.errors import DataError

PACKAGE = Path(__file__).parents[2] / "fp8train"
LOWER = (
    *("precision", "update_rules", "numerics", "kernels", "comm", "layers", "models", "parallel", "optim"),
    *("data", "checkpoint", "inference", "huggingface"),
)

DOTTED = [key for key in key_table().keys if "." in key]
# A whole key: "model.norm" is one, "model.norm.weight" and "the_model.norm" are not.
NAMED = re.compile(rf"(?<![\w.])({'|'.join(re.escape(key) for key in DOTTED)})(?!\w|\.\w)")


def texts(source: str) -> Iterator[str]:
    """String constants, those in f-strings too, without docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


@pytest.mark.parametrize("package", LOWER)
def test_no_lower_package_names_a_key(package: str) -> None:
    """They do not know where their arguments were written; whoever read the configuration does."""
    found = [
        f"{path.relative_to(PACKAGE)}: {key} in {text!r}"
        for path in sorted((PACKAGE / package).rglob("*.py"))
        for text in texts(path.read_text())
        for key in NAMED.findall(text)
    ]
    assert not found, "\n".join(found)


def test_the_search_finds_keys_in_texts() -> None:
    source = (
        '"""data.seq_length"""\nx = f"{y}: lower train.global_batch_size, not model.norm.weight"\n# run.dir\n'
    )
    assert [key for text in texts(source) for key in NAMED.findall(text)] == ["train.global_batch_size"]
    assert NAMED.findall("Set data.split. Or (precision.gemm): x.run.dir") == ["data.split", "precision.gemm"]


def test_an_argument_is_the_last_word_of_its_key() -> None:
    assert set(KEYS.values()) <= set(DOTTED)
    assert all(key.endswith(f".{argument}") for argument, key in KEYS.items())


def test_errors_name_keys_where_arguments_came_from_a_configuration() -> None:
    with pytest.raises(DataError) as caught, naming_keys():
        raise DataError("`seq_length` is 4, not 8; see `fp8train doctor` and `other`\nwrite `split`=[1,0,0]")
    assert str(caught.value) == (
        "data.seq_length is 4, not 8; see `fp8train doctor` and `other`\nwrite data.split=[1,0,0]"
    )
    assert with_keys("lower `keep_last`") == "lower checkpoint.keep_last"
    with pytest.raises(ValueError, match=r"^`split`$"), naming_keys():
        raise ValueError("`split`")  # a bug's text is left alone
    assert issubclass(DataError, UserError)
