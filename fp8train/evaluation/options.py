"""What ``fp8train eval`` is asked for, checked as far as that needs no torch: a mistake answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fp8train.data.indexed_dataset import IndexedDataset
from fp8train.inference.errors import InferenceError


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate on: a dataset unless ``text`` or ``tasks`` names files. None: not given.

    Attributes:
        numerics: which to measure; ``both`` measures once where the run's own are BF16.
        batch_size: sequences per forward; default: ``train.micro_batch_size``.
        split: part of a dataset; default ``valid``.
        batches: of a dataset, see :func:`~fp8train.evaluation.perplexity.open_text`.
        prefix: dataset, see there.
        text: files of text.
        stride: tokens between windows of text; default: the context.
        one_stream: text documents end to end.
        json_key: key of the text in ``.jsonl`` files; default ``text``.
        tasks: files of examples.
        delimiter: between context and continuation; default a space.
        apart: tokenise these two by themselves, as fine-tuning does.
        limit: examples of each task; default all.
        context: tokens that the model reads at once; default ``model.max_seq_len``.
        json_file: where rank 0 writes the unrounded numbers.
    """

    numerics: Literal["matched", "bf16", "both"]
    batch_size: int | None = None
    split: Literal["train", "valid", "test"] | None = None
    batches: int | None = None
    prefix: str | None = None
    text: Sequence[Path] = ()
    stride: int | None = None
    one_stream: bool = False
    json_key: str | None = None
    tasks: Sequence[Path] = ()
    delimiter: str | None = None
    apart: bool = False
    limit: int | None = None
    context: int | None = None
    json_file: Path | None = None

    def check(self) -> None:
        """Refuse options of another kind of evaluation, and files that are not there.

        Raises:
            InferenceError: names the option and what it needs.
            DataError: ``prefix`` is no dataset.
        """
        dataset = {"--split": self.split, "--batches": self.batches, "--prefix": self.prefix}
        text = {"--stride": self.stride, "--stream": self.one_stream or None, "--json-key": self.json_key}
        tasks = {"--delimiter": self.delimiter, "--limit": self.limit, "--apart": self.apart or None}
        if self.text and self.tasks:
            raise InferenceError("--text and --tasks are evaluated one at a time; leave one of them out")
        groups = [("--text", bool(self.text), text), ("--tasks", bool(self.tasks), tasks)]
        groups += [("a dataset, not of --text or --tasks", not self.text and not self.tasks, dataset)]
        for owner, chosen, options in groups:
            given = [name for name, value in options.items() if value is not None]
            if given and not chosen:
                raise InferenceError(f"{given[0]} is an option of {owner}")
        if self.context is not None and not self.text and not self.tasks:
            raise InferenceError(
                "--context is for --text and --tasks; datasets have the run's data.seq_length"
            )
        for option, files in (("--text", self.text), ("--tasks", self.tasks)):
            for file in files:
                if file.is_dir() or not file.exists():  # a pipe is as good as a file
                    why = "not a file" if file.exists() else "no such file"
                    raise InferenceError(f"{option} {file}: {why}; give a file of text or .jsonl")
        if self.prefix is not None:
            IndexedDataset(self.prefix)
        if self.json_file is not None and not self.json_file.absolute().parent.is_dir():
            raise InferenceError(f"--json {self.json_file}: its folder does not exist; make it first")
