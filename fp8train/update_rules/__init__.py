"""Update rules of optimizers, one file each, and the registry of their names.

A rule says what it needs (moments, settings, whole matrices or elements) and how old values become new ones.
``optim`` keeps the states and moves them through the rule.
"""
