"""FP8 number formats, scales and casts. Imports torch and nothing else of the project but its errors.

A tensor is stored as codes of a small format (``formats``) and a scale: it is multiplied by ``scale`` and
rounded to codes, and a code times ``scale_inv`` is its value. :mod:`fp8train.precision` says how one operand
is to be quantised, ``scale`` makes a scale from a largest magnitude (amax), ``cast`` makes the codes. Scales
of rows and blocks are in ``granularity`` and ``block_scales``, those from earlier steps in ``scale_state``;
``statistics`` measures what a cast lost.
"""
