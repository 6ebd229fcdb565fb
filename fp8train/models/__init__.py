"""The model: one decoder, of which GPT and Llama are settings.

``build`` makes it from a configuration. ``parametrization`` (and ``mus``, ``unit_scaling``) gives its initial
values, multipliers and learning rates; ``fp8_plan`` decides which linears run in FP8, and ``connect`` carries
that out.
"""
