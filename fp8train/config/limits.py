"""Numbers beyond which nothing could ever run, so that a slip of the finger is refused at once.

A model is built block by block, threads are started and the samples of a step are listed: of ten million
layers, threads or billions of samples a machine is busy until its memory or someone's patience ends. Each
limit is fifty times or more what has been published, and none keeps a value below it from being too large for
the machine at hand: :mod:`fp8train.training.room` compares with that.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_LAYERS = 10_000
MAX_WIDTH = 2**20
MAX_MLP_WIDTH = 8 * MAX_WIDTH
MAX_VOCAB = 2**24
MAX_CONTEXT = 2**27
MAX_BATCH = 10**7
MAX_STEPS = 10**9
MAX_TOKENS = 10**16
MAX_RANKS = 2**20
MAX_THREADS = 2**12
LIMITS = {
    *(MAX_LAYERS, MAX_WIDTH, MAX_MLP_WIDTH, MAX_VOCAB, MAX_CONTEXT),
    *(MAX_BATCH, MAX_STEPS, MAX_TOKENS, MAX_RANKS, MAX_THREADS),
}
"""All of them; a message names one only where it was passed."""

Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
MlpWidth = Annotated[int, Field(ge=1, le=MAX_MLP_WIDTH)]
Vocabulary = Annotated[int, Field(ge=1, le=MAX_VOCAB)]
Context = Annotated[int, Field(ge=1, le=MAX_CONTEXT)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Ranks = Annotated[int, Field(ge=1, le=MAX_RANKS)]
Threads = Annotated[int, Field(ge=1, le=MAX_THREADS)]
