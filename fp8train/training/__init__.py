"""A run from its checks to its end: the loop of steps, checkpoints, signals, and where it starts from.

``preflight`` checks what needs no torch. ``run`` builds everything and starts ``loop``, which calls the
trainer (:mod:`fp8train.step`) once per optimizer step, and ``saving``, evaluation and the reporter between
steps.
"""
