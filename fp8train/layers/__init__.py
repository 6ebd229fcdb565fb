"""The pieces of a decoder. Layers receive what they need as arguments and know nothing of configuration
files.

Start with ``linear``: its three GEMMs (output, grad_input, grad_weight) are the ones that run in FP8, in
``fp8_linear``, with operands that ``fp8_operand`` casts and weights that ``fp8_weight`` keeps. ``wire`` says
what a linear sends to tensor-parallel ranks, ``grad_weight_op`` how its weight gradient gets to the gradient
store.
"""
