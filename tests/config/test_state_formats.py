"""One format of an optimizer state, written over every preset: it is taken, or refused for its own sake."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.precision_schema import StateFormatConfig
from fp8train.config.resolve import resolve_mapping
from tests.config.examples import minimal

ROLES = ("master", "exp_avg", "exp_avg_sq")
FORMATS = get_args(StateFormatConfig.model_fields["format"].annotation)
# What docs/recipes.md and the schema say of a format: whether it has scales, and whether it loses bits.
SCALED = {"fp16_scaled", "e4m3", "e5m2"}
ROUNDED = SCALED | {"bf16"}


def precision(level: str, profile: str, plan: str, **state: Any) -> dict[str, Any]:
    return {"level": level, "profile": profile, "gemm": {"fp8": True}, "state": {"plan": plan, **state}}


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [*((plan, "adamw") for plan in ("default", "coat", "e4m3_e5m2", "lean")), ("default", "lion")],
)
@pytest.mark.parametrize("profile", ["default", "paper"])
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_a_format_alone_is_taken_or_refused_by_name(
    level: str, profile: str, plan: str, optimizer: str
) -> None:
    roles = ROLES[:2] if optimizer == "lion" else ROLES
    for role, name in itertools.product(roles, FORMATS):
        written = precision(level, profile, plan, **{role: {"format": name}})
        data = {**minimal(), "precision": written, "optimizer": {"lr": 1e-3, "name": optimizer}}
        if name == "bf16_remainder" and role != "master":
            with pytest.raises(
                ConfigError, match=rf"precision\.state\.{role}\.format: format: bf16_remainder: it"
            ):
                resolve_mapping(data)
            continue
        built = resolve_mapping(data).config.state_formats.formats()
        assert list(built) == list(roles)
        assert built[role].format == name
        for fmt in built.values():
            assert fmt.format in SCALED or fmt.granularity == "block"
            assert fmt.format in ROUNDED or fmt.rounding == "nearest"
            assert not fmt.expand or (fmt.format in ("e4m3", "e5m2") and fmt.granularity == "block")
        # What still says something is filled as before.
        if profile == "paper" and plan == "default" and name in SCALED:
            assert built[role].granularity == "tensor"
        if plan == "coat" and role != "master" and name in ("e4m3", "e5m2"):
            assert built[role].expand
        if role == "master" and plan != "e4m3_e5m2" and level != "O0" and name in ROUNDED:
            nearest = profile == "paper" and plan != "lean"
            assert built[role].rounding == ("nearest" if nearest else "stochastic")


def test_the_eight_byte_variant_of_the_paper() -> None:
    """FP8-LM, section 2.2: FP32 masters instead of FP16, the rest of its 6 bytes as they are."""
    data = {**minimal(), "precision": precision("O2", "default", "default", master={"format": "fp32"})}
    assert str(resolve_mapping(data).config.state_formats) == (
        "master=fp32 exp_avg=e4m3/block128 exp_avg_sq=fp16_scaled/block128"
    )


def test_another_granularity_leaves_no_expansion_behind() -> None:
    written = precision("O2", "default", "coat", exp_avg={"granularity": "tensor"})
    plan = resolve_mapping({**minimal(), "precision": written}).config.state_formats
    assert str(plan.exp_avg) == "e4m3/tensor"
    assert str(plan.exp_avg_sq) == "e4m3/block128/expanded"


MEANINGLESS = {
    "rounding": ("master", {"format": "fp32", "rounding": "stochastic"}, "rounding.*no effect.* is fp32"),
    "granularity": ("exp_avg", {"format": "bf16", "granularity": "tensor"}, "no effect.* is bf16"),
    "granularity of what the level keeps": ("exp_avg", {"granularity": "tensor"}, "no effect.* is fp32"),
    "expand": ("exp_avg", {"format": "fp16_scaled", "expand": True}, "expand.*no effect.* is fp16_scaled"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANINGLESS)
def test_what_a_person_wrote_is_refused(case: str) -> None:
    role, state, message = MEANINGLESS[case]
    data = {**minimal(), "precision": precision("O1", "default", "default", **{role: state})}
    with pytest.raises(ConfigError, match=message):
        resolve_mapping(data)
