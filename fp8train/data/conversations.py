"""Prompts and responses, and chats, as text of which a model learns only the answers.

A record is ``{"prompt": str, "response": str}`` or ``{"messages": [{"role": str, "content": str}, ..]}`` with
the roles ``system`` (first, if at all), ``user`` and ``assistant``. Either becomes segments of text:

* prompt, **response**: as they are. Line breaks and markers between them belong to the prompt.
* every message of a chat after a line ``<|role|>``: that of a user or the system ends with a line break, the
  **content of an assistant** with the end-of-document id, so that the model learns where an answer ends::

      <|system|>
      Be brief.
      <|user|>
      What is FP8?
      <|assistant|>
      Eight-bit floating point.<end of document><|user|>
      ...

The bold segments and the end-of-document ids after them are targets. Segments are tokenised apart: a prompt
has the same tokens whatever follows, at training and when it is asked later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fp8train.data.cleaning import Report
from fp8train.data.errors import DataError
from fp8train.data.tokenizer import Tokenizer

EMPTY_ANSWER = "skipped: an answer is empty"
OPEN_END = "repaired: messages after the last answer dropped"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text, which is either learnt or only read.

    Attributes:
        text: any.
        is_target: whether it, and an end-of-document id after it, is learnt.
    """

    text: str
    is_target: bool


def segments_of(record: Mapping[str, Any], place: str, report: Report) -> list[Segment] | None:
    """Cut a record into segments; None where it has nothing to learn, which is counted.

    Args:
        record: of one line.
        place: ``file:line``.
        report: counted into.

    Raises:
        DataError: the record has neither form; names the place.
    """
    if "messages" in record:
        segments = _chat(record["messages"], place, report)
    elif "prompt" in record and "response" in record:
        for key in ("prompt", "response"):
            if not isinstance(record[key], str):
                raise DataError(f"{place}: {key} is not a string")
        segments = [Segment(record["prompt"], False), Segment(record["response"], True)]
    else:
        raise DataError(f"{place}: neither prompt and response nor messages")
    if not all(segment.text.strip() for segment in segments if segment.is_target):
        report.note(EMPTY_ANSWER, place)
        return None
    return segments


def _chat(messages: object, place: str, report: Report) -> list[Segment]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages is not a list with something in it")
    segments: list[Segment] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{place}: message {number} is not {{role, content}} with a string as content")
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{place}: message {number} has the role {role!r}; known: {', '.join(ROLES)}")
        if role == "system" and number:
            raise DataError(f"{place}: message {number} is the system's; only the first may be")
        header = f"<|{role}|>\n"
        if role == "assistant":
            segments += [Segment(header, False), Segment(message["content"], True)]
        else:
            segments.append(Segment(f"{header}{message['content']}\n", False))
    last = max((i for i, segment in enumerate(segments) if segment.is_target), default=None)
    if last is None:
        raise DataError(f"{place}: no message is the assistant's, so there is nothing to learn")
    if last + 1 < len(segments):
        report.note(OPEN_END, place)
    return segments[: last + 1]


def encode_segments(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a conversation and which of them are targets.

    Returns:
        (int32 [n], uint8 [n] of 0 and 1); the last token is the end-of-document id.
    """
    tokens: list[int] = []
    mask: list[int] = []
    read = ""
    for segment in segments:
        if not segment.is_target:
            read += segment.text  # what is read in a row is tokenised in one piece
            continue
        before = tokenizer.encode(read) if read else []
        learnt = [*tokenizer.encode(segment.text), tokenizer.eod_id]
        tokens += before + learnt
        mask += [0] * len(before) + [1] * len(learnt)
        read = ""
    return np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.uint8)
