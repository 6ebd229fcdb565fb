"""The base class of configuration sections, and the types of their numbers."""

from __future__ import annotations

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
    return PydanticCustomError("contradiction", "{message}", {"message": message, "keys": keys})


class Section(BaseModel):
    """Base of every section: unknown keys refused, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
