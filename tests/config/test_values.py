"""Sections of ``precision`` and the values that they build: the same fields, defaults and choices."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest

from fp8train.config.gemm_schema import GemmConfig, QuantConfig
from fp8train.config.precision_schema import (
    Fp8GradientConfig,
    GradientConfig,
    PrecisionConfig,
    StateConfig,
    StateFormatConfig,
    TrafficConfig,
)
from fp8train.config.section import Section
from fp8train.precision.gradients import Fp8Gradients, Gradients
from fp8train.precision.linear_gemms import GEMMS, LinearQuant
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.precision import Precision
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.precision.traffic import Traffic
from tests.training.tiny import tiny_config

USES = {use.replace(".", "_") for uses in GEMMS.values() for use in uses}
# Value fields that are no key of their section: keys of a section within it, or decided elsewhere.
PAIRS: list[tuple[type[Section], type, set[str]]] = [
    (QuantConfig, QuantSpec, set()),
    (GemmConfig, LinearQuant, USES | {"grad_weight_fp8"}),
    (StateFormatConfig, StateFormat, {"block", "fit"}),
    (StateConfig, StateFormats, set()),
    (Fp8GradientConfig, Fp8Gradients, set()),
    (GradientConfig, Gradients, set()),
    (TrafficConfig, Traffic, set()),
    (PrecisionConfig, Precision, {"smooth_swiglu", "guard_action"}),
]


@pytest.mark.parametrize(
    ("section", "value", "others"), PAIRS, ids=lambda part: getattr(part, "__name__", "")
)
def test_a_section_has_the_fields_of_its_value(section: type[Section], value: type, others: set[str]) -> None:
    """A default that differed would be refused as a setting that somebody wrote."""
    keys = section.model_fields
    assert {field.name for field in fields(value)} - set(keys) == others
    for field in fields(value):
        if field.name in keys and not keys[field.name].is_required() and value is not Traffic:
            assert field.default is not MISSING
            assert field.default == keys[field.name].default, field.name


def test_every_traffic_that_is_fp8_travels_so() -> None:
    kinds = TrafficConfig(
        activations="fp8", grad_output="compute", grad_input="fp8", weights="compute"
    ).value()
    assert kinds == Traffic(activations=True, grad_input=True)
    assert set(get_type_hints(Traffic)) == set(TrafficConfig.model_fields)


def test_the_values_of_a_run() -> None:
    """FP8-LM's O2, by hand."""
    precision = tiny_config(["precision.level=O2"]).precision.value()
    assert precision.gemm == LinearQuant(fast_accumulation=True)
    assert (precision.gradient.format.name, precision.gradient.fp8) == ("e4m3", Fp8Gradients())
    assert precision.state == StateFormats(
        StateFormat("fp16_scaled", rounding="stochastic"), StateFormat("e4m3"), StateFormat("fp16_scaled")
    )
    assert (precision.weights, precision.traffic) == ("fp8", Traffic())
    assert tiny_config().precision.value() == Precision(
        None, Gradients(), StateFormats(), "compute", Traffic()
    )
