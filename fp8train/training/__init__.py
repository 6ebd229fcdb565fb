"""One training run: the step, the loop around it, its run directory, metrics, guards and signals."""
