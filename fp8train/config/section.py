"""The base class of configuration sections, and the types of their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


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
