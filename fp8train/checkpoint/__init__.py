"""Checkpoints that are whole or absent: saving, verifying, finding and loading, in any sharding.

``save`` and ``load`` move named tensors between ranks and a directory, ``background`` saves while training
goes on, ``catalog`` says which directory to continue from, ``rng`` turns random generators into tensors.
"""
