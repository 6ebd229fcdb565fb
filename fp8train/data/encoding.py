"""Units of input to token arrays, in one process or several, always in the same order.

Workers are separate processes because tokenising is CPU-bound Python and C++ work; they are *spawned*, so no
thread or lock of the parent is inherited. A bounded window of units is in flight, which bounds the memory
however large the input is.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fp8train.data.cleaning import Report
from fp8train.data.errors import DataError
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.sources import Unit, read_unit
from fp8train.data.tokenizer import Tokenizer

_UNITS_IN_FLIGHT_PER_WORKER = 4


@dataclass
class EncodedUnit:
    """The documents of one unit of input, as tokens.

    Attributes:
        tokens: int32 ``[sum(lengths)]``, documents end to end, each ending with the end-of-document id.
        lengths: Tokens per document.
        source_bytes: UTF-8 bytes of the cleaned text.
        exact_bytes: Whether every document's tokens stand for exactly its bytes.
        report: What was skipped or repaired.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    lengths: list[int] = field(default_factory=list)
    source_bytes: int = 0
    exact_bytes: bool = True
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class Encoder:
    """Turns units of input into tokens; picklable, so that worker processes get it whole.

    Attributes:
        tokenizer_path: Tokenizer file.
        eod_token: As for :func:`fp8train.data.load_tokenizer.load_tokenizer`.
        text_key: Key of the text in JSONL records.
        max_line_bytes: Documents with a longer line are skipped.
    """

    tokenizer_path: Path
    eod_token: str | None
    text_key: str
    max_line_bytes: int

    def encode_units(self, units: Sequence[Unit], *, workers: int) -> Iterator[EncodedUnit]:
        """Encode ``units`` in order; the result does not depend on ``workers``.

        Raises:
            DataError: A file cannot be read, or a worker process died.
        """
        if workers <= 1 or len(units) <= 1:
            tokenizer = load_tokenizer(self.tokenizer_path, eod_token=self.eod_token)
            for unit in units:
                yield self.encode(unit, tokenizer)
            return
        context = multiprocessing.get_context("spawn")
        in_flight: deque[Future[EncodedUnit]] = deque()
        pool = ProcessPoolExecutor(min(workers, len(units)), context, _WorkerState.start, (self,))
        try:
            for unit in units:
                in_flight.append(pool.submit(_WorkerState.run, unit))
                if len(in_flight) >= workers * _UNITS_IN_FLIGHT_PER_WORKER:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process died, most likely out of memory; use fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, unit: Unit, tokenizer: Tokenizer) -> EncodedUnit:
        """Read, clean and tokenise one unit in this process."""
        result = EncodedUnit()
        token_lengths = tokenizer.token_lengths()
        result.exact_bytes = token_lengths is not None
        arrays = [result.tokens]
        for text in read_unit(
            unit, result.report, text_key=self.text_key, max_line_bytes=self.max_line_bytes
        ):
            ids = np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=np.int32)
            num_bytes = len(text.encode("utf-8"))
            if token_lengths is not None and int(token_lengths[ids].sum()) != num_bytes:
                result.exact_bytes = False
            result.source_bytes += num_bytes
            result.lengths.append(len(ids))
            arrays.append(ids)
        result.tokens = np.concatenate(arrays)
        return result


class _WorkerState:
    """The tokenizer of a worker process: loaded when it starts, used by every unit it is given."""

    encoder: Encoder
    tokenizer: Tokenizer

    @classmethod
    def start(cls, encoder: Encoder) -> None:
        cls.encoder = encoder
        cls.tokenizer = load_tokenizer(encoder.tokenizer_path, eod_token=encoder.eod_token)

    @classmethod
    def run(cls, unit: Unit) -> EncodedUnit:
        return cls.encoder.encode(unit, cls.tokenizer)
