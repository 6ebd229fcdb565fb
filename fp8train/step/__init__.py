"""One optimizer step: the trainer, what it is assembled from, what is watched, whether replicas agree."""
