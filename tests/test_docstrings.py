"""Public docstrings say what a thing does: no mere reference to another place, no fragment of a sentence."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

REFERENCES = ("See ", "Of ", "As ")
"""Openings that leave a reader without a sentence: "See :class:`Storage`.", "Of a tensor."."""
FEWEST_WORDS = 3


def public_docstrings(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, first paragraph) of a module and of what is public in it, methods included."""

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef, path: str) -> Iterator[tuple[str, str]]:
        docstring = ast.get_docstring(node)
        if docstring is not None:
            yield path, " ".join(docstring.split("\n\n")[0].split())
        if isinstance(node, ast.FunctionDef):
            return  # what is defined inside is nobody else's
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and is_public(child.name):
                yield from visit(child, f"{path}.{child.name}")

    yield from visit(tree, name)


def is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def says_nothing(first_paragraph: str) -> bool:
    return first_paragraph.startswith(REFERENCES) or len(first_paragraph.split()) < FEWEST_WORDS


def refused(tree: ast.Module, name: str) -> list[str]:
    return [f"{path}: {text}" for path, text in public_docstrings(tree, name) if says_nothing(text)]


def test_public_docstrings_are_sentences() -> None:
    wrong = []
    files = sorted((ROOT / "fp8train").rglob("*.py"))
    assert len(files) > 200
    for path in files:
        wrong += refused(ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_docstrings_sees_modules_classes_and_methods() -> None:
    tree = ast.parse(
        '"""See elsewhere, for all that is here."""\n'
        "class Public:\n"
        '    """A storage of states."""\n'
        "    def __init__(self):\n"
        '        """Of a tensor and its scale."""\n'
        "    @property\n"
        "    def size(self):\n"
        '        """Two words."""\n'
        "    def load(self):\n"
        '        """As :meth:`Base.load`,\n        but slower.\n\n        More about it.\n        """\n'
        "    def _helper(self):\n"
        '        """See the class."""\n'
        "class _Private:\n"
        "    def method(self):\n"
        '        """See the class."""\n'
        "def function():\n"
        '    """Return the largest magnitude."""\n'
        "    def inside():\n"
        '        """See above."""\n'
    )
    assert refused(tree, "m") == [
        "m: See elsewhere, for all that is here.",
        "m.Public.__init__: Of a tensor and its scale.",
        "m.Public.size: Two words.",
        "m.Public.load: As :meth:`Base.load`, but slower.",
    ]
