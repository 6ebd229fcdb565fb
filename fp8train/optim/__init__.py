"""Optimizers, their states, and learning-rate schedules.

A parameter has a master weight and moments, each stored in a format of its own (``make_storage``,
``storage``, ``scaled_storage``). ``optimizer`` moves them through the update in chunks; ``adamw`` and
``lion`` are the update rules.
"""
