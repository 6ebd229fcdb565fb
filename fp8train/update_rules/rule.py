"""What an update rule is: what it declares, and how it turns old values into new ones.

A rule is one file of this package and one name in :mod:`fp8train.update_rules.registry`. What it declares is
all that others know of it: the configuration (which settings it reads), the states (which moments to keep)
and the pass over them (elements in chunks, or a whole matrix at once).

The configuration reads declarations, and must not wait for torch. So the files of this package import it for
types only; the maths are methods of tensors.

A rule that works on **elements** is told flat chunks, and its result must not depend on where a tensor is
cut. One that works on **matrices** (:class:`MatrixRule`) is told the whole matrix of a hidden linear; an
element rule of its choice updates everything else. Its price: a matrix cannot be cut between ranks, and the
temporaries of a step are those of the largest matrix instead of a few chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor

NewValues = Iterator[tuple[str, "Tensor"]]
Load = Callable[[str], "Tensor"]

ALIGNMENT = 64
"""Chunks of elements begin at multiples of this: the vector tails of kernels, which may round differently,
then fall where they fall in one piece."""


@dataclass(frozen=True)
class RuleSettings:
    """Hyper-parameters that every rule has; ``lr`` is the peak that the schedule multiplies."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """Take the settings' fields out of ``values``, which may hold others too."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepScalars:
    """One step's numbers for one parameter.

    Attributes:
        step: 1-based count of updates.
        lr: learning rate, schedule and the parameter's multiplier included.
        decay: share of the weight to remove.
        rounded: whether moments come back from their storage rounded.
    """

    step: int
    lr: float
    decay: float
    rounded: bool


class Rule(ABC):
    """An update rule that works on elements; subclasses declare and implement it.

    Attributes:
        name: as the registry has it, the name of the rule's file.
        summary: a sentence or two for the reference of settings.
        has_second_moment: whether it keeps ``exp_avg_sq`` beside ``exp_avg``.
        settings_type: the hyper-parameters that it reads.
        settings: the values of those.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    has_second_moment: ClassVar[bool]
    settings_type: ClassVar[type[RuleSettings]] = RuleSettings

    def __init__(self, settings: RuleSettings) -> None:
        assert type(settings) is self.settings_type, f"{self.name} with {type(settings).__name__}"
        self.settings = settings

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Rule:
        """Make the rule from the values of hyper-parameters by name; it takes those that it reads."""
        return cls(cls.settings_type.of(values))

    @classmethod
    def roles(cls) -> tuple[str, ...]:
        """The states of a parameter: its master weight and moments."""
        return ("master", "exp_avg", "exp_avg_sq") if cls.has_second_moment else ("master", "exp_avg")

    @classmethod
    def reads(cls, setting: str) -> bool:
        """Whether the rule has a hyper-parameter of this name."""
        return any(field.name == setting for field in fields(cls.settings_type))

    def numbers(self, scalars: StepScalars) -> Mapping[str, float] | None:
        """The step's numbers as :mod:`fp8train.kernels.optimizer_update` reads them for a rule of this name,
        absent ones 0; None for a rule that it does not know."""
        del scalars
        return None

    @abstractmethod
    def new_values(self, scalars: StepScalars, gradient: Tensor, load: Load) -> NewValues:
        """Yield each role once with its new values.

        Args:
            scalars: the step's numbers.
            gradient: clipped and averaged, in the type of the arithmetic, FP32 or FP64: a flat chunk, or the
                whole matrix [rows, columns] for a :class:`MatrixRule`.
            load: old values of a role in the same type and shape; the rule may overwrite them.
        """


class MatrixRule(Rule):
    """An update rule that needs the whole matrix of a hidden linear.

    Attributes:
        others_type: the element rule that updates all other parameters: embedding, head, norms, biases.
        others: that rule.
    """

    others_type: ClassVar[type[Rule]]

    def __init__(self, settings: RuleSettings, others: Rule) -> None:
        super().__init__(settings)
        assert type(others) is self.others_type and not isinstance(others, MatrixRule)
        self.others = others

    @classmethod
    def of(cls, values: Mapping[str, object]) -> MatrixRule:
        """Make the rule and its element rule from the values of hyper-parameters by name."""
        return cls(cls.settings_type.of(values), cls.others_type.of(values))

    @classmethod
    def reads(cls, setting: str) -> bool:
        """Whether the rule or its element rule has a hyper-parameter of this name."""
        return super().reads(setting) or cls.others_type.reads(setting)
