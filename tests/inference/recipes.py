"""Recipes whose checkpoints are tested: a new one joins by its name."""

RECIPES: dict[str, tuple[str, ...]] = {
    name: (f"precision.recipe={name}",)
    for name in ("current", "fp8_amax", "te_current", "te_delayed", "te_delayed_recent")
} | {"paper": ("precision.profile=paper",)}
