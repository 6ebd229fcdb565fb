"""Makes output folders that appear complete or not at all, and reads texts to measure perplexity on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp8train.files import TMP_SUFFIX
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.parity import PERPLEXITY_TOKENS
from fp8train.inference.load import TrainedRun


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that gets its name at the end, or is deleted after an error.

    Args:
        path: ``--output``: absent, or an empty folder.

    Raises:
        HuggingFaceError: something is there already, or it cannot be written.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise HuggingFaceError(f"--output {path}: exists and is not empty; choose another folder")
    temporary = path.with_name(f".{path.name}{TMP_SUFFIX}")
    try:
        if temporary.exists():  # of an attempt that was killed
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise HuggingFaceError(f"--output {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_text(path: Path, run: TrainedRun) -> list[int]:
    """The first tokens of a text, one more than perplexities are of.

    Raises:
        HuggingFaceError: it cannot be read, or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HuggingFaceError(f"--text {path}: {error}") from None
    # A token has at least a byte; no tokenizer in use makes tokens of 100 characters on average.
    tokens = run.tokenizer().encode(text[: 100 * PERPLEXITY_TOKENS])[: PERPLEXITY_TOKENS + 1]
    if len(tokens) < 2:
        raise HuggingFaceError(f"--text {path}: less than two tokens")
    return tokens
