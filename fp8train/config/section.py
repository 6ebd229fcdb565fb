"""The base class of configuration sections, and the types of their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fp8train.precision.problems import PrecisionError

PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]

T = TypeVar("T")


def contradiction(message: str, *keys: str) -> PydanticCustomError:
    """The error a validator raises; ``keys`` are the fields of the section that do not fit together, worst
    first."""
    context = {"message": message, "keys": keys}
    return PydanticCustomError("contradiction", "{message}", {**context, "all": [context]})


def contradictions(errors: Iterable[PydanticCustomError]) -> PydanticCustomError:
    """Several of them as one error, since a validator can raise only one."""
    contexts = [context for error in errors for context in (error.context or {})["all"]]
    message = "; ".join(context["message"] for context in contexts)
    return PydanticCustomError("contradiction", "{message}", {"message": message, "all": contexts})


class Section(BaseModel):
    """Base of every section: unknown keys refused, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ValueSection(Section):
    """Base of the sections that stand for a value of :mod:`fp8train.precision`, whose rules are theirs."""

    def value(self) -> Any:
        """What the section stands for.

        Raises:
            PrecisionError: settings that mean nothing together; none of a validated section.
        """
        raise NotImplementedError

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        try:
            self.value()
        except PrecisionError as error:
            found = [contradiction(problem.message, *problem.keys) for problem in error.problems]
            raise contradictions(found) from None
        return self


def build(kind: type[T], section: Section, **given: object) -> T:
    """A value of this dataclass from the fields that the section has too; ``given`` go before them."""
    values = dict(given)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in type(section).model_fields and field.name not in given:
            value = getattr(section, field.name)
            values[field.name] = value.value() if isinstance(value, ValueSection) else value
    return kind(**values)
