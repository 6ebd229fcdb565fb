"""What an unquoted YAML word means.

YAML 1.2 core schema, minus its surprises: PyYAML and most 1.1 readers turn ``no`` into False, ``010`` into 8
and leave ``3e-4`` a string. Here ``no``/``on`` are text (the schema refuses text where a bool belongs, and
says what to write), ``3e-4`` is a number, and ``010``, which readers disagree about, is refused.
"""

from __future__ import annotations

import re

from fp8train.config.nodes import Scalar

MAX_DIGITS = 400
"""Longest number literal; float64 ends near 1e308, and Python itself refuses integers of more than 4300
digits."""

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_SPECIAL_FLOAT = re.compile(r"(?P<sign>[-+]?)\.(?P<name>inf|Inf|INF)|\.(?P<nan>nan|NaN|NAN)")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_LEADING_ZERO = re.compile(r"(?P<sign>[-+]?)0+(?P<rest>[0-9]+)")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_YAML11_WORD = re.compile(r"(?i)y|n|yes|no|on|off|true|false|null|~|<<|=")
_YAML11_NUMBER = re.compile(r"[-+.]?[0-9][0-9_,:.eExXoOa-fA-F+-]*|[-+]?\.(?i:inf|nan)")


class ScalarError(ValueError):
    """The word cannot be read; the message says what to write instead."""


def parse_plain(text: str) -> Scalar:
    """Value of an unquoted scalar.

    Raises:
        ScalarError: for octal-looking numbers, oversized numbers and unprintable characters.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if special := _SPECIAL_FLOAT.fullmatch(text):
        return float("nan") if special["nan"] else float(special["sign"] + "inf")
    number = _FLOAT.fullmatch(text) or _PREFIXED.fullmatch(text)
    if number and len(text) > MAX_DIGITS:
        raise ScalarError(f"a number of {len(text)} characters; at most {MAX_DIGITS} are read")
    if octal := _LEADING_ZERO.fullmatch(text):
        plain = octal["sign"] + octal["rest"].lstrip("0") if octal["rest"].strip("0") else "0"
        raise ScalarError(
            f"{shorten(text)} looks octal (8-based in YAML 1.1, decimal in YAML 1.2); "
            f'write {shorten(plain)} for the number or "{shorten(text)}" for text'
        )
    if _INTEGER.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if number:
        return float(text)
    return check_text(text)


def check_text(text: str) -> str:
    """``text`` itself, if it can be printed, stored and used as a path.

    Raises:
        ScalarError: for control characters (other than tab and line ends) and unpaired surrogates.
    """
    if bad := _UNPRINTABLE.search(text):
        raise ScalarError(f"text holds the unprintable character U+{ord(bad[0]):04X}; remove it")
    return text


def needs_quotes(text: str) -> bool:
    """Whether some YAML reader, 1.1 or 1.2, would take the unquoted text for something other than a
    string."""
    return bool(
        text in _NULL
        or _YAML11_WORD.fullmatch(text)
        or _YAML11_NUMBER.fullmatch(text)
        or text != text.strip()
    )


def shorten(text: str, limit: int = 40) -> str:
    """``text`` cut to ``limit`` characters, for messages."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
