"""Transformer Engine's Python sources, parsed and never imported: without CUDA they cannot be.

They are where ``FP8TRAIN_TE_SOURCES`` says (the directory ``transformer_engine`` of a wheel), in
``share/transformer-engine`` of the environment, or installed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

import pytest


@cache
def root() -> Path | None:
    """The directory ``transformer_engine``."""
    spec = importlib.util.find_spec("transformer_engine")
    candidates = [
        os.environ.get("FP8TRAIN_TE_SOURCES", ""),
        Path(sys.prefix, "share", "transformer-engine", "transformer_engine"),
        *(spec.submodule_search_locations or () if spec is not None else ()),
    ]
    found = (Path(candidate) for candidate in candidates if candidate)
    return next((path for path in found if (path / "pytorch").is_dir()), None)


@cache
def parsed(file: str) -> ast.Module:
    """A file below ``transformer_engine/pytorch``; the test is skipped without sources."""
    where = root()
    if where is None:
        pytest.skip("no sources of Transformer Engine; name their directory in FP8TRAIN_TE_SOURCES")
    return ast.parse((where / "pytorch" / file).read_text())


def named(tree: ast.AST, path: str) -> ast.AST:
    """A class or function by its dotted path."""
    for name in path.split("."):
        kinds = ast.ClassDef | ast.FunctionDef
        tree = next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name)
    return tree


def parameters(file: str, path: str) -> dict[str, str | None]:
    """Parameters of a function in order, with the text of their defaults; None: required."""
    function = named(parsed(file), path)
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*defaults, *arguments.defaults], strict=True))
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    found = {one.arg: None if default is None else ast.unparse(default) for one, default in pairs}
    found.pop("self", None)
    return found


def fields(file: str, path: str) -> dict[str, str | None]:
    """Fields of a dataclass, likewise."""
    body = named(parsed(file), path)
    assert isinstance(body, ast.ClassDef)
    found = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(one.target): None if one.value is None else ast.unparse(one.value) for one in found}


def calls(file: str, function: str) -> list[tuple[str, list[str]]]:
    """Where a function is called: what its result is assigned to, and the text of its arguments."""
    return [
        (ast.unparse(node.targets[0]), [ast.unparse(argument) for argument in node.value.args])
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == function
    ]


def imports(file: str) -> set[str]:
    """``module.name`` of everything that a file imports by ``from``."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
