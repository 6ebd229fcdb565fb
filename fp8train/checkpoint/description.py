"""The structure of ``meta.json``: what a program that reads a checkpoint may rely on.

A file can be whole by its hash and still hold other values than expected: edited by hand and signed anew, or
written by another program. So everything that is read later is checked here, once, and what does not fit is
one error that names file and key. Keys that are not known are kept, for later versions add some; keys that
earlier versions did not write are optional. Of the stored configuration the sections are checked, and the
numbers that are calculated with: all else is only compared.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from fp8train.checkpoint.errors import CorruptCheckpointError, explain_os_error
from fp8train.checkpoint.manifest import META_FILE, first_problem
from fp8train.config.schema import Config

_MOST_LEVELS = 100
"""Of nesting; ours have about ten. What reads and copies them recurses."""

_LEFT_OUT: Any = None
"""Of what may be left out, but is an object where it stands: null is refused."""

Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]
AtLeastOne = Annotated[StrictInt, Field(ge=1, lt=2**63)]


class _Known(BaseModel):
    """Checks the keys that it knows and lets others be."""

    model_config = ConfigDict(strict=True, extra="allow")


class _DataPlace(_Known):
    step: Count
    samples: Count = 0
    left_out: list[Annotated[tuple[Count, Count], Field(strict=False)]] = []
    global_batch_size: AtLeastOne
    seq_length: AtLeastOne
    dataset: StrictStr
    fingerprint: StrictStr


class _Guard(_Known):
    locked: dict[str, StrictInt]
    current: dict[str, StrictInt] = {}
    actions: Count = 0
    levels: dict[str, Annotated[tuple[StrictInt, StrictInt], Field(strict=False)]] = {}
    usual: list[Annotated[tuple[StrictStr, StrictStr, StrictFloat, StrictInt], Field(strict=False)]]


class _Spikes(_Known):
    loss: list[StrictFloat]
    grad_norm: list[StrictFloat]
    told: StrictFloat | None


class _TrainerState(_Known):
    updates: Count
    optimizer: StrictStr | None = None
    reduction: StrictStr = ""
    unchanged: dict[str, Any] = {}
    rewinds: Count = 0
    guard: _Guard = _LEFT_OUT
    spikes: _Spikes = _LEFT_OUT


class _Stage(_Known):
    steps: AtLeastOne
    global_batch_size: AtLeastOne


class _Train(_Known):
    steps: AtLeastOne | None = None
    tokens: AtLeastOne | None = None
    global_batch_size: AtLeastOne = 1
    batch_size_ramp: list[_Stage] = []


class _Lengths(_Known):
    seq_length: AtLeastOne = 1


class _Numbers(_Known):
    train: _Train = _Train()
    data: _Lengths = _Lengths()


def _configuration(values: dict[str, Any]) -> dict[str, Any]:
    for key in _not_sections(Config, values, ""):
        raise ValueError(f"{key} is not a section")
    try:
        _Numbers.model_validate(values)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    return values


def _not_sections(section: type[BaseModel], values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Keys where a section of the schema is something else."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        if len(kinds) > 1 and type(None) not in kinds:
            continue  # a list of them
        below = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if below is None or name not in values:
            continue
        if isinstance(values[name], Mapping):
            yield from _not_sections(below, values[name], f"{path}{name}.")
        elif values[name] is not None or type(None) not in kinds:
            yield f"{path}{name}"


class _Meta(_Known):
    config: Annotated[dict[str, Any], AfterValidator(_configuration)] = {}
    vocab_size: AtLeastOne = 1
    tokenizer: StrictStr | None = None
    data: _DataPlace = _LEFT_OUT
    trainer: _TrainerState = _LEFT_OUT
    eval_loss: StrictFloat | StrictStr | None = None
    finite: bool = True


class _Description(_Known):
    step: Count
    meta: _Meta

    @model_validator(mode="after")
    def _one_step(self) -> _Description:
        if self.meta.data is not None and self.meta.data.step != self.step:
            raise ValueError(f"meta.data.step is {self.meta.data.step}, but step is {self.step}")
        return self


def read_meta_file(directory: Path) -> tuple[int, dict[str, Any]]:
    """Step and JSON values that the save was given.

    Raises:
        CorruptCheckpointError: what does not fit, by file and key.
    """
    path = directory / META_FILE
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: unreadable: {explain_os_error(error)}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: damaged: not JSON: {error}") from None
    if levels_exceed(content, _MOST_LEVELS):
        raise CorruptCheckpointError(f"{path}: damaged: nested deeper than {_MOST_LEVELS} levels")
    try:
        _Description.model_validate(content)
    except ValidationError as error:
        raise CorruptCheckpointError(f"{path}: damaged: {first_problem(error)}") from None
    return content["step"], content["meta"]


def levels_exceed(value: Any, most: int) -> bool:
    """Whether objects and lists are nested deeper than that, found without recursion."""
    level = [value]
    for _ in range(most + 1):
        level = [
            below
            for one in level
            if isinstance(one, dict | list)
            for below in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
