"""Reads the formats of optimizer states from ``precision.state`` in the configuration."""

from __future__ import annotations

from fp8train.config.errors import ConfigError
from fp8train.config.precision_schema import StateFormatConfig
from fp8train.config.schema import Config
from fp8train.optim.state_plan import StateFormat, StatePlan
from fp8train.update_rules.registry import rule_named


def state_plan(config: Config) -> StatePlan:
    """The formats of the optimizer states that the configuration asks for.

    Raises:
        ConfigError: formats that do not fit their role.
    """
    state, fit = config.precision.state, config.checkpoint.reshard == "requantise"
    has_second = rule_named(config.optimizer.name).has_second_moment
    second = state_format(state.exp_avg_sq, fit=fit) if has_second else None
    try:
        return StatePlan(state_format(state.master, fit=fit), state_format(state.exp_avg, fit=fit), second)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def state_format(config: StateFormatConfig, *, fit: bool = False) -> StateFormat:
    """The format of one state of the FP8 plan's matrices; ``fit`` as in :class:`StateFormat`."""
    return StateFormat(
        name=config.format,
        granularity=config.granularity,
        expand=config.expand,
        sqrt=config.sqrt,
        rounding=config.rounding,
        fit=fit,
    )
