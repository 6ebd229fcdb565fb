"""The recipes that there are: the files of :mod:`fp8train.config.recipes`."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from fp8train.config import recipes
from fp8train.config.recipe_values import Recipe

DEFAULT_RECIPE = "current"


def _names() -> tuple[str, ...]:
    """The default, then the others by name."""
    found = sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))
    return (DEFAULT_RECIPE, *(name for name in found if name != DEFAULT_RECIPE))


RECIPE_NAMES = _names()
RECIPES: Mapping[str, Recipe] = {
    name: import_module(f"{recipes.__name__}.{name}").RECIPE for name in RECIPE_NAMES
}
STATIC_RECIPES = tuple(name for name, recipe in RECIPES.items() if recipe.is_static)
"""Recipes that cast without scales: each is a parametrisation too, of the same name."""


def described() -> str:
    """What each recipe does, for the reference of settings."""
    at_rest = {True: "; weights rest in the compute type", False: ""}
    return " ".join(
        f"``{name}``: {recipe.summary}{at_rest[recipe.values.get('precision.weights') == 'compute']}."
        for name, recipe in RECIPES.items()
    )
