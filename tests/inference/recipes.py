"""Recipes whose checkpoints are tested: a new one joins by its name."""

STATIC = {"mus": 0.06, "unit_scaling": 0.1, "umup": 0.5}
"""With their learning rates: weights have unit variance."""

RECIPES: dict[str, tuple[str, ...]] = {
    name: (f"precision.recipe={name}",)
    for name in ("current", "fp8_amax", "te_current", "te_delayed", "te_delayed_recent")
} | {
    "paper": ("precision.profile=paper",),
    **{name: (f"precision.recipe={name}", f"optimizer.lr={lr}") for name, lr in STATIC.items()},
}
