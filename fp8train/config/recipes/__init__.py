"""The recipes, one file each: what ``precision.recipe: NAME`` fills is ``RECIPE`` of the file NAME.py.

:mod:`fp8train.config.recipe_registry` finds the files, so a new recipe is a new file. Its YAML, which the
tests train, goes to ``configs/recipes/``; ``docs/recipes.md`` says when to take which.
"""
