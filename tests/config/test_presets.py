"""Who fills what: family, level and recipe against tables written here from the documentation, and who
wins."""

from __future__ import annotations

from typing import Any

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.presets import PRESETS, filled_keys
from fp8train.config.recipe_registry import RECIPE_NAMES
from fp8train.config.recipe_values import GEMM_OPERANDS
from fp8train.config.resolve import resolve_mapping
from tests.config.examples import minimal


def merged(**sections: dict[str, Any]) -> dict[str, Any]:
    data = minimal()
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys}
    return data


@pytest.mark.parametrize(
    ("family", "positions", "norm", "activation", "bias", "tied", "ffn"),
    [
        ("gpt", "learned", "layernorm", "gelu", True, True, 256),
        ("llama", "rope", "rmsnorm", "swiglu", False, False, 256),
    ],
)
def test_family(
    family: str, positions: str, norm: str, activation: str, bias: bool, tied: bool, ffn: int
) -> None:
    resolved = resolve_mapping(merged(model={"family": family}))
    model = resolved.config.model
    assert (model.positions, model.norm, model.activation) == (positions, norm, activation)
    assert (model.bias, model.tie_embeddings, model.ffn_hidden_size) == (bias, tied, ffn)
    assert (model.num_kv_heads, model.head_dim, model.max_seq_len) == (4, 16, 32)
    assert str(resolved.origins["model.norm"]) == f"preset model.family={family}"


@pytest.mark.parametrize(
    ("hidden_size", "ffn"), [(4096, 11008), (5120, 13824), (192, 512), (96, 256), (288, 768)]
)
def test_llama_mlp_width_is_the_published_one(hidden_size: int, ffn: int) -> None:
    """4096 -> 11008 and 5120 -> 13824 are Llama-2 7B and 13B."""
    data = merged(model={"hidden_size": hidden_size, "num_heads": 8})
    assert resolve_mapping(data).config.model.ffn_hidden_size == ffn


def test_every_family_choice_can_be_overridden_alone() -> None:
    model = resolve_mapping(
        merged(
            model={
                "family": "gpt",
                "positions": "rope",
                "bias": False,
                "head_dim": 24,
                "ffn_hidden_size": 100,
            }
        )
    ).config.model
    assert (model.positions, model.bias, model.norm) == ("rope", False, "layernorm")
    assert (model.head_dim, model.ffn_hidden_size) == (24, 100)


def test_a_width_that_heads_do_not_divide_is_fine_with_an_explicit_head_dim() -> None:
    assert resolve_mapping(merged(model={"num_heads": 5, "head_dim": 16})).config.model.head_dim == 16


def test_level_o0_is_high_precision_everywhere() -> None:
    resolved = resolve_mapping(minimal())
    precision = resolved.config.precision
    assert (precision.level, precision.recipe, precision.compute) == ("O0", "current", "bf16")
    assert precision.gemm.fp8 is False
    assert (precision.gradient.accumulate, precision.gradient.reduce) == ("fp32", "fp32")
    assert str(resolved.origins["precision.gemm.fp8"]) == "preset precision.level=O0"
    assert str(resolved.origins["precision.gemm.output.x.format"]) == "preset precision.recipe=current"
    assert str(resolved.origins["precision.level"]) == "default"


def test_recipe_current_uses_e5m2_for_grad_output_only() -> None:
    gemm = resolve_mapping(merged(precision={"gemm": {"fp8": True}})).config.precision.gemm
    uses = {
        "output.x": gemm.output.x,
        "output.w": gemm.output.w,
        "grad_input.grad_output": gemm.grad_input.grad_output,
        "grad_input.w": gemm.grad_input.w,
        "grad_weight.grad_output": gemm.grad_weight.grad_output,
        "grad_weight.x": gemm.grad_weight.x,
    }
    for name, spec in uses.items():
        assert spec.format == ("e5m2" if name.endswith("grad_output") else "e4m3"), name
        assert (spec.granularity, spec.scale_source, spec.power_of_two) == ("tensor", "current", True)
        assert (spec.margin, spec.rounding) == (0, "nearest")


RECIPES = {
    # name: (source, power of two, history, reduce), the same for all operands
    "current": ("current", True, 16, "max"),
    "fp8_amax": ("current", True, 16, "max"),
    "coat_act": ("current", True, 16, "max"),
    "te_current": ("current", False, 16, "max"),
    "te_delayed": ("delayed", False, 1024, "max"),
    "te_delayed_recent": ("delayed", False, 1, "most_recent"),
    "mse": ("mse", True, 16, "max"),
    "mus": ("constant", True, 16, "max"),
    "unit_scaling": ("constant", True, 16, "max"),
    "umup": ("constant", True, 16, "max"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fills_all_six_operands(name: str) -> None:
    gemm = resolve_mapping(merged(precision={"recipe": name, "level": "O2"})).config.precision.gemm
    for spec in (
        *(gemm.output.x, gemm.output.w, gemm.grad_input.grad_output),
        *(gemm.grad_input.w, gemm.grad_weight.grad_output, gemm.grad_weight.x),
    ):
        assert (spec.scale_source, spec.power_of_two, spec.history, spec.reduce) == RECIPES[name]
        assert (spec.granularity, spec.margin) == ("tensor", 0)


def test_coat_keeps_activations_in_fp8() -> None:
    for recipe, kept in (("coat_act", "fp8"), ("current", "compute")):
        written = {"recipe": recipe, "level": "O2"}
        assert resolve_mapping(merged(precision=written)).config.precision.activations == kept
    for train in ({"compile": "block"}, {"activation_checkpointing": "selective"}):
        settings = {**minimal()["train"], **train}
        with pytest.raises(ConfigError, match=r"or precision\.activations: compute"):
            resolve_mapping(merged(precision={"activations": "fp8"}, train=settings))
    cut = {"parallel": {"tp": 2}, "model": {"family": "gpt", "ffn_hidden_size": 48}}
    with pytest.raises(ConfigError, match=r"inside groups of 16 elements .* legal: 1 or 3"):
        resolve_mapping(merged(precision={"activations": "fp8"}, **cut))
    resolve_mapping(merged(precision={"activations": "fp8"}, parallel={"tp": 2}))


def test_the_recipes_of_these_tests_are_there() -> None:
    assert {*RECIPES, *OTHER_RECIPES, "nvfp4_simulated"} <= set(RECIPE_NAMES)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_chooses_the_scales_of_all_six_operands(name: str) -> None:
    resolved = resolve_mapping(merged(precision={"recipe": name, "level": "O2"}))
    for use in GEMM_OPERANDS:
        for key in ("format", "granularity", "scale_source", "rounding"):
            origin = str(resolved.origins[f"precision.gemm.{use}.{key}"])
            assert origin == f"preset precision.recipe={name}", (use, key)


OTHER_RECIPES = {
    # name: what x, w and grad_output share a scale over, in the order of GEMM_OPERANDS; keep_x, keep_w
    "rowwise": (["row"] * 6, "second_copy", "second_copy"),
    "rowwise_gw_hp": (["row", "row", "row", "tensor", "row", "row"], "bf16", "second_copy"),
    "blockwise": (
        ["block_1x128", "block_128x128", "block_1x128", "block_128x128", "block_1x128", "block_1x128"],
        *("second_copy", "same"),
    ),
    "mxfp8": (["mx_1x32"] * 6, "second_copy", "second_copy"),
    "cscale": (["tensor"] * 6, "same", "same"),
}


@pytest.mark.parametrize("level", ["O1", "O3"])
def test_the_recipe_of_simulated_nvfp4(level: str) -> None:
    """1x16 blocks of x and grad_output, 16x16 of w; gradients are rounded stochastically, and both operands
    of weight gradients transformed before."""
    written = {"recipe": "nvfp4_simulated", "level": level}
    precision = resolve_mapping(merged(precision=written)).config.precision
    gemm = precision.gemm
    line, square = ("nv_1x16", "nearest", False), ("nv_16x16", "nearest", False)
    expected = [
        *(line, square, ("nv_1x16", "stochastic", False), square),
        *(("nv_1x16", "stochastic", True), ("nv_1x16", "nearest", True)),
    ]
    specs = [
        *(gemm.output.x, gemm.output.w, gemm.grad_input.grad_output),
        *(gemm.grad_input.w, gemm.grad_weight.grad_output, gemm.grad_weight.x),
    ]
    assert [(spec.granularity, spec.rounding, spec.hadamard) for spec in specs] == expected
    assert {(spec.format, spec.scale_source, spec.power_of_two) for spec in specs} == {
        ("e2m1", "current", False)
    }
    assert (gemm.keep_x, gemm.keep_w, precision.weights) == ("bf16", "same", "compute")
    traffic = precision.traffic
    assert {traffic.activations, traffic.grad_output, traffic.weights} == {"compute"}
    assert traffic.grad_input == ("fp8" if level == "O3" else "compute")


@pytest.mark.parametrize("name", OTHER_RECIPES)
@pytest.mark.parametrize("level", ["O1", "O3"])
def test_a_recipe_of_rows_blocks_or_constants(name: str, level: str) -> None:
    precision = resolve_mapping(merged(precision={"recipe": name, "level": level})).config.precision
    gemm = precision.gemm
    specs = [
        *(gemm.output.x, gemm.output.w, gemm.grad_input.grad_output),
        *(gemm.grad_input.w, gemm.grad_weight.grad_output, gemm.grad_weight.x),
    ]
    granularities, keep_x, keep_w = OTHER_RECIPES[name]
    assert [spec.granularity for spec in specs] == granularities
    assert (gemm.keep_x, gemm.keep_w) == (keep_x, keep_w)
    assert gemm.grad_weight.fp8 == (name != "rowwise_gw_hp")
    wire = (precision.traffic.activations, precision.traffic.weights)
    if name == "cscale":
        e4m3, e5m2 = ("e4m3", 4), ("e5m2", 20)
        assert [(spec.format, spec.constant_exponent) for spec in specs] == [
            *(e4m3, ("e4m3", 8), e5m2, ("e4m3", 8), e5m2, e4m3)
        ]
        assert (precision.weights, *wire) == ("fp8", *(("fp8", "fp8") if level == "O3" else ("compute",) * 2))
        return
    assert {(spec.format, spec.scale_source, spec.power_of_two) for spec in specs} == {
        ("e4m3", "current", True)
    }
    sent = "fp8" if level == "O3" and name != "rowwise_gw_hp" else "compute"
    assert (precision.weights, *wire) == ("compute", sent, "compute")


@pytest.mark.parametrize(
    ("precision", "fast"),
    [
        ({"level": "O0", "gemm": {"fp8": True}}, True),
        ({"level": "O3"}, True),
        ({"level": "O2", "recipe": "rowwise"}, True),
        ({"level": "O2", "profile": "paper"}, False),
        ({"level": "O2", "gemm": {"fast_accumulation": False}}, False),
        ({"level": "O2", "profile": "paper", "gemm": {"fast_accumulation": True}}, True),
        # Transformer Engine asserts the full accumulator for scales of blocks.
        ({"level": "O2", "recipe": "blockwise"}, False),
        ({"level": "O2", "recipe": "mxfp8"}, False),
        ({"level": "O1", "recipe": "nvfp4_simulated"}, False),
    ],
)
def test_the_forward_gemm_accumulates_fast_where_its_scales_are_outside_the_sum(
    precision: dict[str, Any], fast: bool
) -> None:
    quant = resolve_mapping(merged(precision=precision)).config.precision.gemm
    assert quant.fast_accumulation is fast
    if (value := quant.value()) is not None:
        assert value.fast_accumulation is fast


def test_fast_accumulation_of_blocks_is_refused() -> None:
    precision = {"recipe": "blockwise", "level": "O2", "gemm": {"fast_accumulation": True}}
    with pytest.raises(ConfigError, match=r"fast_accumulation.* has no effect: .* is block_1x128"):
        resolve_mapping(merged(precision=precision))


def test_an_operand_with_another_source_takes_nothing_of_delayed_scales() -> None:
    """One key moves an operand away from the recipe: what the recipe said of its history goes with it."""
    current = {"scale_source": "current"}
    constant = {"scale_source": "constant", "constant_exponent": 3}
    written = {
        "level": "O2",
        "recipe": "te_delayed",
        "gemm": {
            "output": {"w": current, "x": constant},
            "grad_input": {"w": current},
            "grad_weight": {"x": constant},
        },
    }
    gemm = resolve_mapping(merged(precision=written)).config.precision.gemm
    assert (gemm.output.w.history, gemm.output.w.power_of_two) == (16, False)
    assert (gemm.output.x.history, gemm.output.x.power_of_two) == (16, True)
    assert gemm.grad_input.grad_output.history == 1024


PRECEDENCE = [
    # what is written, whether FP8 GEMMs run, margin of output.x, gradient.reduce, origin of gemm.fp8
    ({}, False, 0, "fp32", "preset precision.level=O0"),
    ({"level": "O0"}, False, 0, "fp32", "preset precision.level=O0"),
    ({"gemm": {"fp8": True}}, True, 0, "fp32", "config"),
    ({"level": "O0", "gemm": {"fp8": True}}, True, 0, "fp32", "config"),
    (
        {"recipe": "current", "gemm": {"fp8": True, "keep_x": "bf16", "output": {"x": {"margin": 2}}}},
        True,
        2,
        "fp32",
        "config",
    ),
    ({"gradient": {"reduce": "bf16"}}, False, 0, "bf16", "preset precision.level=O0"),
    (
        {"level": "O0", "compute": "fp32", "gradient": {"reduce": "bf16"}},
        False,
        0,
        "bf16",
        "preset precision.level=O0",
    ),
]


@pytest.mark.parametrize("case", range(len(PRECEDENCE)))
def test_explicit_wins_over_recipe_over_level(case: int) -> None:
    written, fp8, margin, reduce, origin = PRECEDENCE[case]
    resolved = resolve_mapping(merged(precision=written))
    precision = resolved.config.precision
    assert (precision.gemm.fp8, precision.gemm.output.x.margin, precision.gradient.reduce) == (
        fp8,
        margin,
        reduce,
    )
    assert precision.gemm.output.w.margin == 0
    assert str(resolved.origins["precision.gemm.fp8"]) == origin


def test_later_tables_win() -> None:
    """Level, recipe: the order documented for settings; a key filled by both would come from the recipe. A
    recipe may choose the parametrisation."""
    keys = [
        "model.family",
        "precision.level",
        "precision.recipe",
        "precision.profile",
        "precision.state.plan",
        "parametrization.kind",
        "engine",
    ]
    assert [table.key for table in PRESETS] == keys


LEVELS = {
    # FP8 GEMMs, gradients, master, first and second moment, weights between steps (FP8-LM, section 2)
    "O0": (False, "high_precision", "fp32", "fp32", "fp32", "compute"),
    "O1": (True, "e4m3", "fp16_scaled", "fp32", "fp32", "fp8"),
    "O2": (True, "e4m3", "fp16_scaled", "e4m3", "fp16_scaled", "fp8"),
}


@pytest.mark.parametrize("level", LEVELS)
def test_level(level: str) -> None:
    precision = resolve_mapping(merged(precision={"level": level})).config.precision
    state = precision.state
    filled = (
        precision.gemm.fp8,
        precision.gradient.format,
        state.master.format,
        state.exp_avg.format,
        state.exp_avg_sq.format,
        precision.weights,
    )
    assert filled == LEVELS[level]
    fp8 = precision.gradient.fp8
    assert (fp8.accumulate, fp8.reduce, fp8.block) == ("bf16", "exchange", 128)
    assert state.master.rounding == ("nearest" if level == "O0" else "stochastic")


def test_the_paper_profile_is_the_paper() -> None:
    """FP8-LM A.2 and MS-AMP: windows of 16 for activations and output gradients, of 1 for weights; one
    scale per tensor; a shared-scale reduction; masters rounded to nearest."""
    precision = resolve_mapping(merged(precision={"level": "O2", "profile": "paper"})).config.precision
    gemm = precision.gemm
    for delayed in (gemm.output.x, gemm.grad_input.grad_output, gemm.grad_weight.grad_output):
        assert (delayed.scale_source, delayed.history, delayed.reduce) == ("delayed", 16, "max")
    assert gemm.grad_weight.x == gemm.output.x
    assert gemm.output.w.scale_source == gemm.grad_input.w.scale_source == "current"
    assert precision.gradient.fp8.reduce == "shared_scale"
    state = precision.state
    assert {state.master.granularity, state.exp_avg.granularity, state.exp_avg_sq.granularity} == {"tensor"}
    assert state.master.rounding == "nearest"
    assert (state.bounded_update, precision.gradient.fp8.mu_initial) == (False, "one_over_root_ranks")
    # Explicit settings win over the profile, and take along what belongs to the profile's own.
    changed = {"level": "O2", "profile": "paper", "gradient": {"fp8": {"reduce": "exchange"}}}
    fp8 = resolve_mapping(merged(precision=changed)).config.precision.gradient.fp8
    assert (fp8.reduce, fp8.mu_initial) == ("exchange", "one_over_ranks")
    changed = {"level": "O2", "profile": "paper", "state": {"bounded_update": True}}
    assert resolve_mapping(merged(precision=changed)).config.precision.state.bounded_update


def test_ours_are_bounded_and_start_at_one_over_n() -> None:
    precision = resolve_mapping(merged(precision={"level": "O2"})).config.precision
    assert (precision.state.bounded_update, precision.gradient.fp8.mu_initial) == (True, "one_over_ranks")


@pytest.mark.parametrize(
    ("level", "optimizer"), [("O0", "adamw"), ("O1", "adamw"), ("O2", "lion"), ("O1", "lion")]
)
def test_the_paper_fills_no_bound_where_nothing_is_bounded(level: str, optimizer: str) -> None:
    """FP32 moments need none, and Lion has no second one."""
    written = {"level": level, "profile": "paper", "gemm": {"fp8": True}}
    resolved = resolve_mapping(merged(precision=written, optimizer={"lr": 1e-4, "name": optimizer}))
    assert str(resolved.origins["precision.state.bounded_update"]) == "default"


@pytest.mark.parametrize("value", [True, False])
def test_a_bound_that_nothing_reads_is_refused(value: bool) -> None:
    lion = {"lr": 1e-4, "name": "lion"}
    bound = {"state": {"bounded_update": value}}
    moments = "exp_avg.format is fp32 and precision.state.exp_avg_sq.format is fp32; remove it"
    for written, optimizer, message in (
        ({"level": "O1", **bound}, {}, moments),
        (bound, {}, "has no effect: precision.gemm.fp8 is false"),
        ({"level": "O2", **bound}, lion, "has no effect: optimizer.name is lion; remove it"),
    ):
        if value:  # what would stand there anyway promises nothing
            resolve_mapping(merged(precision=written, optimizer=optimizer))
            continue
        with pytest.raises(ConfigError, match=r"precision\.state\.bounded_update.*" + message):
            resolve_mapping(merged(precision=written, optimizer=optimizer))
    one = {"level": "O1", "state": {"bounded_update": value, "exp_avg_sq": {"format": "bf16"}}}
    assert resolve_mapping(merged(precision=one)).config.precision.state.bounded_update is value


STATE_PLANS = {
    # format, granularity, rounding and expansion of master, exp_avg, exp_avg_sq
    ("O0", "coat"): [
        ("fp32", "block", "nearest", False),
        *[("e4m3", "block", "nearest", True)] * 2,
    ],
    ("O2", "coat"): [
        ("fp16_scaled", "block", "stochastic", False),
        *[("e4m3", "block", "nearest", True)] * 2,
    ],
    ("O1", "e4m3_e5m2"): [
        (number_format, "tensor", "nearest", False) for number_format in ("fp16_scaled", "e4m3", "e5m2")
    ],
    ("O1", "lean"): [
        ("fp16_scaled", "block", "stochastic", False),
        ("e4m3", "block", "nearest", False),
        ("e4m3", "block", "stochastic", False),
    ],
}


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("plan", ["coat", "e4m3_e5m2", "lean"])
def test_a_state_plan_lies_over_level_and_profile(level: str, plan: str) -> None:
    """COAT, section 4, quantises the two moments; Fishman et al. 2024, section 5, the master too."""
    profiles = ("default", "paper")
    for profile in profiles:
        written = {"level": level, "profile": profile, "gemm": {"fp8": True}, "state": {"plan": plan}}
        resolved = resolve_mapping(merged(precision=written))
        state = resolved.config.precision.state
        roles = (state.master, state.exp_avg, state.exp_avg_sq)
        found = [(one.format, one.granularity, one.rounding, one.expand) for one in roles]
        same_as = {"O3": "O2", "O1": "O2"}.get(level, level) if plan == "coat" else "O1"
        expected = STATE_PLANS[same_as, plan]
        assert state.exp_avg_sq.sqrt is (plan == "lean")
        if plan != "coat" or profile == "default":
            assert found == expected
        else:
            assert found[1:] == expected[1:]
            granularity = "tensor" if expected[0][0] == "fp16_scaled" else "block"  # FP32 has no scale
            assert found[0] == (expected[0][0], granularity, "nearest", False)
        origin = resolved.origins["precision.state.exp_avg.format"]
        assert str(origin) == f"preset precision.state.plan={plan}"
    changed = {"level": level, "gemm": {"fp8": True}, "state": {"plan": plan, "exp_avg": {"format": "e5m2"}}}
    state = resolve_mapping(merged(precision=changed)).config.precision.state
    assert (state.exp_avg.format, state.exp_avg.expand) == ("e5m2", plan == "coat")


def test_a_state_plan_is_of_two_moments() -> None:
    lion = {"optimizer": {"lr": 1e-4, "name": "lion"}}
    for plan in ("coat", "e4m3_e5m2", "lean"):
        with pytest.raises(ConfigError, match=r"has no effect: optimizer\.name is lion"):
            resolve_mapping(merged(precision={"level": "O2", "state": {"plan": plan}}, **lion))
    resolve_mapping(merged(precision={"level": "O2", "state": {"plan": "default"}}, **lion))


REFUSED = {
    "gradients need FP8 GEMMs": (
        {"level": "O1", "gemm": {"fp8": False}},
        "gradient.format applies to the linears that multiply in FP8, but gemm.fp8 is false",
    ),
    "states need FP8 GEMMs": (
        {"state": {"exp_avg": {"format": "e4m3"}}},
        "precision.state.exp_avg.format, precision.gemm.fp8: has no effect: precision.gemm.fp8 is false",
    ),
    "reduction without FP8 gradients": (
        {"gemm": {"fp8": True}, "gradient": {"fp8": {"reduce": "exact"}}},
        "has no effect: precision.gradient.format is high_precision (preset precision.level=O0); ",
    ),
    "profile without FP8": ({"profile": "paper"}, "has no effect: precision.gemm.fp8 is false (preset"),
    "state plan without FP8": (
        {"state": {"plan": "coat"}},
        "precision.state.plan, precision.gemm.fp8: has no effect",
    ),
    "mu of another reduction": (
        {"level": "O2", "gradient": {"fp8": {"mu_window": 5}}},
        "or write precision.gradient.fp8.reduce=shared_scale",
    ),
    "start of mu of another reduction": (
        {"level": "O2", "gradient": {"fp8": {"mu_initial": "one"}}},
        "or write precision.gradient.fp8.reduce=shared_scale",
    ),
    "nodes of another reduction": (
        {"level": "O2", "gradient": {"fp8": {"reduce": "exact", "node_size": 2}}},
        "node_size, precision.gradient.fp8.reduce: has no effect: precision.gradient.fp8.reduce is exact",
    ),
    "FP8 accumulation by default": (
        {"level": "O2", "gradient": {"fp8": {"accumulate": "fp8"}}},
        "write accumulate: bf16",
    ),
    "history of a current scale": (
        {"level": "O1", "gemm": {"output": {"x": {"history": 4}}}},
        "output.x.scale_source is current (preset precision.recipe=current); remove it, or write",
    ),
    "constant without a constant": (
        {"level": "O1", "gemm": {"output": {"x": {"scale_source": "constant"}}}},
        "scale_source: constant needs constant_exponent",
    ),
    "random rounding of FP8": (
        {"level": "O1", "gemm": {"output": {"x": {"rounding": "stochastic"}}}},
        "has no effect: precision.gemm.output.x.format is e4m3",
    ),
    "a transform of FP8 operands": (
        {"level": "O1", "gemm": {"grad_weight": {"x": {"hadamard": True}}}},
        "has no effect: precision.gemm.grad_weight.x.format is e4m3",
    ),
    "weights that rest in simulated operands": (
        {"level": "O1", "recipe": "nvfp4_simulated", "weights": "fp8"},
        "write weights: compute",
    ),
    "no source for BF16 weights": (
        {"level": "O1", "gemm": {"keep_w": "bf16"}},
        "keep_w: bf16 needs weights in the compute type",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_would_be_ignored_are_refused(case: str) -> None:
    written, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        resolve_mapping(merged(precision=written))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_simulated_operands_have_no_codes_to_send() -> None:
    written = {"level": "O1", "recipe": "nvfp4_simulated", "traffic": {"activations": "fp8"}}
    with pytest.raises(ConfigError, match="operands are simulated and have none; write"):
        resolve_mapping(merged(precision=written, parallel={"tp": 2}))


def test_only_what_a_user_must_write_is_required() -> None:
    from fp8train.config.keys import KeyTable

    required = {key.name for key in KeyTable().keys.values() if key.required}
    assert required == {
        "model", "model.family", "model.num_layers", "model.hidden_size", "model.num_heads",
        "data", "data.seq_length", "optimizer", "optimizer.lr",
        "train", "train.global_batch_size", "train.micro_batch_size",
    }  # fmt: skip
    assert filled_keys() <= set(KeyTable().keys)
