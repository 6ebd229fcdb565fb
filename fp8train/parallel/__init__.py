"""How one model is trained by many processes: gradients, pipeline stages, sharded optimizer states.

``gradients`` adds up what micro-batches and ranks contribute; ``pipeline`` runs the stages that ``stages``
deals out; ``zero`` says which rank keeps the optimizer states of what, and ``zero_weights`` brings new
weights back to everyone.
"""
