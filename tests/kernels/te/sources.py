"""Transformer Engine's Python sources, read without importing them: where names are, and what they take.

They come from its wheel, which installs on machines that cannot run it (``launch/test.sh`` puts it into the
virtual environment's ``share/transformer-engine``).
"""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VERSION = "2.20.2"
HOME = Path(sys.prefix, "share", "transformer-engine")
INSTALL = f"pip install --no-deps --target {HOME} transformer-engine=={VERSION}"


def find_sources() -> Path | None:
    """The folder of the package ``transformer_engine``; None where it is not there."""
    folders = [Path(found) for found in [os.environ.get("FP8TRAIN_TE_SOURCES")] if found] or [HOME]
    for folder in folders:
        for package in (folder / "transformer_engine", folder):
            if (package / "pytorch" / "cpp_extensions" / "gemm.py").is_file():
                return package
    return None


@dataclass(frozen=True)
class Signature:
    """What a function or a class's constructor takes, ``self`` and ``cls`` left out."""

    positional: tuple[str, ...]
    keywords: frozenset[str]
    required: frozenset[str]
    defaults: dict[str, str]
    anything: bool

    def problem(self, count: int, names: frozenset[str]) -> str | None:
        """Why a call with ``count`` positional arguments and keywords of these names would fail."""
        if count > len(self.positional):
            return f"{count} positional arguments for {self.positional}"
        given = set(self.positional[:count]) | names
        if unknown := names - self.keywords - set(self.positional):
            return None if self.anything else f"unknown {sorted(unknown)}"
        if missing := self.required - given:
            return f"missing {sorted(missing)}"
        return None


def signature_of(function: ast.FunctionDef) -> Signature:
    arguments = function.args
    ordered = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    ordered = ordered[1:] if ordered[:1] in (["self"], ["cls"]) else ordered
    values = dict(zip(reversed(ordered), reversed(arguments.defaults), strict=False))
    only = [argument.arg for argument in arguments.kwonlyargs]
    values |= {
        name: value for name, value in zip(only, arguments.kw_defaults, strict=True) if value is not None
    }
    return Signature(
        tuple(ordered),
        frozenset([*ordered, *only]),
        frozenset(name for name in [*ordered, *only] if name not in values),
        {name: ast.unparse(value) for name, value in values.items()},
        arguments.kwarg is not None,
    )


class Sources:
    """The package's modules, by dotted names without ``transformer_engine.``."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.module = cache(self._module)

    def _path(self, name: str) -> Path | None:
        base = self.package.joinpath(*[part for part in name.split(".") if part])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None

    def _module(self, name: str) -> ast.Module:
        path = self._path(name)
        assert path is not None, f"transformer_engine has no module {name}"
        return ast.parse(path.read_text())

    def _absolute(self, module: str, node: ast.ImportFrom) -> str | None:
        """The module that a statement in ``module`` imports from; None outside the package."""
        if node.level == 0:
            head, _, rest = (node.module or "").partition(".")
            return rest if head == "transformer_engine" else None
        path = self._path(module)
        parts = (
            module.split(".") if path is not None and path.name == "__init__.py" else module.split(".")[:-1]
        )
        kept = parts[: len(parts) - (node.level - 1)]
        return ".".join([*kept, *((node.module or "").split(".") if node.module else [])])

    def find(self, module: str, name: str) -> tuple[str, ast.stmt]:
        """Where ``module.name`` is defined, through what it is imported from."""
        found = self._find(module, name)
        assert found is not None, f"transformer_engine.{module} has no {name}"
        return found

    def _find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        stars = []
        for node in ast.walk(self.module(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == name for target in node.targets
            ):
                return module, node
            if isinstance(node, ast.ImportFrom) and (source := self._absolute(module, node)) is not None:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._find(source, alias.name)
                    if alias.name == "*":
                        stars.append(source)
        for source in stars:
            if (found := self._find(source, name)) is not None:
                return found
        return None

    def bases(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
        """The class and those of the package that it is made of, the nearest first."""
        found = [(module, node)]
        for base in node.bases:
            above = self._find(module, base.id) if isinstance(base, ast.Name) else None
            if above is not None and isinstance(above[1], ast.ClassDef):
                found += self.bases(above[0], above[1])
        return found

    def method(self, module: str, name: str, method: str) -> Signature:
        """The signature of a class's method."""
        where, node = self.find(module, name)
        assert isinstance(node, ast.ClassDef), f"{name} is no class"
        for _, one in self.bases(where, node):
            for item in one.body:
                if isinstance(item, ast.FunctionDef) and item.name == method:
                    return signature_of(item)
        raise AssertionError(f"transformer_engine.{module}.{name} has no {method}")

    def call(self, module: str, name: str) -> Signature:
        """What ``module.name(...)`` takes."""
        where, node = self.find(module, name)
        if isinstance(node, ast.FunctionDef):
            return signature_of(node)
        assert isinstance(node, ast.ClassDef), f"{name} cannot be called"
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return self._of_dataclass(node)
        for _, one in self.bases(where, node):
            for constructor in ("__init__", "__new__"):
                for item in one.body:
                    if isinstance(item, ast.FunctionDef) and item.name == constructor:
                        return signature_of(item)
        raise AssertionError(f"{name} has no constructor")

    def _of_dataclass(self, node: ast.ClassDef) -> Signature:
        fields = [
            item
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        names = tuple(field.target.id for field in fields if isinstance(field.target, ast.Name))
        defaults = {
            name: ast.unparse(field.value)
            for name, field in zip(names, fields, strict=True)
            if field.value is not None
        }
        return Signature(names, frozenset(names), frozenset(names) - set(defaults), defaults, False)

    def attributes(self, module: str, name: str) -> set[str]:
        """Attributes of a class's instances: annotated, assigned in it, properties, methods."""
        where, node = self.find(module, name)
        assert isinstance(node, ast.ClassDef), f"{name} is no class"
        found = set()
        for _, one in self.bases(where, node):
            for item in ast.walk(one):
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    found.add(item.target.id)
                if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store):
                    found.add(item.attr)
                if isinstance(item, ast.Assign):
                    found |= {target.id for target in item.targets if isinstance(target, ast.Name)}
                if isinstance(item, ast.FunctionDef):
                    found.add(item.name)
        return found
