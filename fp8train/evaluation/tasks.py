"""Tasks from JSONL files: multiple choice and last words, scored by log-probability.

One file is one task, all of whose lines have the same form:

``{"query": str, "choices": [str, ..], "gold": int}``
    Multiple choice. The answer is the choice with the largest summed log-probability after the query
    (``acc``), or the largest per UTF-8 byte of the choice (``acc_norm``; the first of equals).
    ``gold_log_prob`` is the mean of the right choice's.
``{"context": str, "target": str}`` or ``{"text": str}``
    Last word (LAMBADA). ``text`` is cut at its last space. Right if every token of the target is the
    likeliest one (``acc``); ``perplexity`` is ``exp`` of the mean negative log-probability of a whole target.

Context and continuation are joined by the delimiter, a space unless told otherwise; by nothing where the
context is empty or ends in white space already. The joined text is tokenised as a whole and cut as lm-eval
cuts it (:func:`~fp8train.evaluation.scoring.encode_pair`); the delimiter is part of what is scored, not of
the bytes that ``acc_norm`` divides by. Standard errors are those of a mean of independent examples,
``sqrt(variance / n)`` with the variance over ``n - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import stdev

from fp8train.data.json_lines import json_lines
from fp8train.data.tokenizer import Tokenizer
from fp8train.evaluation.scoring import Request, Score, encode_pair
from fp8train.inference.errors import InferenceError

DELIMITER = " "


@dataclass(frozen=True)
class MultipleChoice:
    """One question with several answers to choose from.

    Attributes:
        place: ``file:line``.
        query: what comes first.
        choices: what may follow, two or more.
        gold: index of the right one.
    """

    place: str
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class LastWord:
    """One text whose end is to be predicted.

    Attributes:
        place: ``file:line``.
        context: the text before.
        target: its end.
    """

    place: str
    context: str
    target: str


@dataclass(frozen=True)
class Task:
    """The examples of one file, all of one form.

    Attributes:
        path: the file.
        examples: all of it, or the first few.
    """

    path: Path
    examples: Sequence[MultipleChoice] | Sequence[LastWord]

    @property
    def kind(self) -> str:
        """The form of the examples: ``multiple_choice`` or ``last_word``."""
        return "multiple_choice" if isinstance(self.examples[0], MultipleChoice) else "last_word"


def read_task(path: Path, *, limit: int | None = None) -> Task:
    """Read the examples of a task from a file.

    Args:
        path: ``.jsonl``, see the module's description.
        limit: read only the first examples; None: all.

    Raises:
        UserError: the file is missing or empty, or a line is malformed; names file and line.
    """
    examples = [_example(place, record) for place, record in islice(json_lines(path), limit)]
    if not examples:
        raise InferenceError(f"{path}: no examples")
    for example in examples:
        if type(example) is not type(examples[0]):
            raise InferenceError(f"{example.place}: another form than the first line; one file is one task")
    return Task(path, examples)  # type: ignore[arg-type]


def _example(place: str, record: dict[str, object]) -> MultipleChoice | LastWord:
    for keys in (("query", "choices", "gold"), ("context", "target"), ("text",)):
        if any(key in record for key in keys):
            missing = [key for key in keys if key not in record]
            if missing:
                raise InferenceError(
                    f"{place}: {keys[0]!r} needs {' and '.join(map(repr, missing))} beside it"
                )
            break
    else:
        raise InferenceError(
            f"{place}: neither query, choices and gold (multiple choice), nor context and target, "
            "nor text (last word)"
        )
    if "choices" in record:
        return _multiple_choice(place, record)
    key = "context" if "context" in record else "text"
    words = record[key]
    if not isinstance(words, str):
        raise InferenceError(f"{place}: {key} is not a string")
    if key == "context":
        target = record["target"]
        if not isinstance(target, str) or not target.strip():
            raise InferenceError(f"{place}: target is not a string with something to predict")
        return LastWord(place, words, target)
    context, space, target = words.rstrip().rpartition(" ")
    if not space or not context:
        raise InferenceError(f"{place}: text has only one word; there is nothing to predict it from")
    return LastWord(place, context, target)


def _multiple_choice(place: str, record: dict[str, object]) -> MultipleChoice:
    query, choices, gold = record["query"], record["choices"], record["gold"]
    if not isinstance(query, str):
        raise InferenceError(f"{place}: query is not a string")
    if not isinstance(choices, list) or len(choices) < 2:
        raise InferenceError(f"{place}: choices is not a list of two or more")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise InferenceError(f"{place}: a choice is not a string with something to score")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise InferenceError(f"{place}: gold is {gold!r}; it must be a number from 0 to {len(choices) - 1}")
    return MultipleChoice(place, query, tuple(choices), gold)


@dataclass(frozen=True)
class Encoded:
    """A task as requests to score.

    Attributes:
        requests: of all examples in order, one per choice.
        truncated: requests whose context lost its beginning.
    """

    requests: list[Request]
    truncated: int


def encode_task(
    task: Task, tokenizer: Tokenizer, *, delimiter: str, context_length: int, apart: bool = False
) -> Encoded:
    """Turn the examples of a task into requests.

    Args:
        task: the examples.
        tokenizer: the model's.
        delimiter: between context and continuation, see the module's description.
        context_length: tokens that the model reads at once; longer contexts lose their beginning.
        apart: tokenise context and continuation by themselves.

    Raises:
        InferenceError: a continuation alone is longer than that; names file and line.
    """
    requests, truncated = [], 0
    for example in task.examples:
        pairs = (
            [(example.query, choice) for choice in example.choices]
            if isinstance(example, MultipleChoice)
            else [(example.context, example.target)]
        )
        for context, continuation in pairs:
            between = delimiter if context and not context[-1].isspace() else ""
            try:
                whole = encode_pair(tokenizer, context, between + continuation, apart=apart)
                requests.append(whole.fitted(context_length))
            except InferenceError as error:
                raise InferenceError(f"{example.place}: {error}") from None
            truncated += requests[-1] is not whole
    return Encoded(requests, truncated)


def task_metrics(task: Task, scores: Sequence[Score]) -> dict[str, float]:
    """Accuracies with their standard errors, and the perplexity of last words.

    Args:
        task: the examples.
        scores: of :func:`encode_task`'s requests, in order.
    """
    if task.kind == "last_word":
        greedy = [float(score.greedy) for score in scores]
        perplexity = math.exp(min(-sum(score.log_prob for score in scores) / len(scores), 700.0))
        return {**_mean("acc", greedy), "perplexity": perplexity}
    right: list[float] = []
    right_norm: list[float] = []
    gold: list[float] = []
    rest = iter(scores)
    for example in task.examples:
        assert isinstance(example, MultipleChoice)
        log_probs = [score.log_prob for score in islice(rest, len(example.choices))]
        gold.append(log_probs[example.gold])
        per_byte = [
            log_prob / len(choice.encode())
            for log_prob, choice in zip(log_probs, example.choices, strict=True)
        ]
        right.append(float(log_probs.index(max(log_probs)) == example.gold))
        right_norm.append(float(per_byte.index(max(per_byte)) == example.gold))
    return {
        **_mean("acc", right),
        **_mean("acc_norm", right_norm),
        "gold_log_prob": sum(gold) / len(gold),
    }


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error, which one example does not have."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {name: mean}
    return {name: mean, f"{name}_stderr": stdev(values) / math.sqrt(len(values))}
