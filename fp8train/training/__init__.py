"""One training run: the step, the loop around it, its run directory, metrics, guards and signals.

``run`` is the command: it builds everything and starts ``loop``, which calls ``trainer`` once per optimizer
step and ``saving``, ``evaluation`` and ``reporter`` between steps.
"""
