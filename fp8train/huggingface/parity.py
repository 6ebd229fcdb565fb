"""The parity report: the same tokens through transformers' model and ours, both in FP32.

A tensor in the wrong place, a transposed matrix or another rotation moves logits by their own size; rounding
of FP32 sums by some 1e-6 of it. The tolerance, 1e-4 of the largest logit, lies between. With a text,
perplexities are compared too. Both models are in memory, 8 bytes for each parameter.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.config.scalars import shorten
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.export_formats import decode
from fp8train.huggingface.files import WeightFiles
from fp8train.inference.load import TrainedRun
from fp8train.inference.weights import inference_config
from fp8train.models.build import build_model
from fp8train.models.decoder import Decoder

TOLERANCE = 1e-4
"""Largest legal difference of two logits, as a share of the largest logit."""
PERPLEXITY_TOKENS = 1024
_SEQUENCES, _LENGTH = 2, 128

Logits = Callable[[Tensor], Tensor]
"""int64 [B, S] -> FP32 [B, S, vocabulary]."""


@dataclass(frozen=True)
class Parity:
    """The result of running two models on the same tokens.

    Attributes:
        difference: largest of two logits.
        largest: largest magnitude of a logit of transformers'.
        tokens: compared positions.
        perplexities: of a text, ours and transformers'; None without one.
        text_tokens: that they are of.
    """

    difference: float
    largest: float
    tokens: int
    perplexities: tuple[float, float] | None = None
    text_tokens: int = 0

    @property
    def passed(self) -> bool:
        """Whether their logits agree within :data:`TOLERANCE`."""
        return self.difference <= TOLERANCE * self.largest

    def lines(self) -> list[str]:
        """Say in one or two lines, for the terminal, how far the models differ."""
        import transformers

        found = [
            f"parity with transformers {transformers.__version__} in FP32, {self.tokens} tokens: largest "
            f"difference of a logit {self.difference:.2e} (largest logit {self.largest:.4g}, tolerance "
            f"{TOLERANCE * self.largest:.1e})"
        ]
        if self.perplexities is not None:
            ours, theirs = self.perplexities
            found.append(
                f"perplexity of {self.text_tokens:,} tokens: {ours:.6g} here, {theirs:.6g} with transformers"
            )
        return found


def wants_check(asked: bool | None, text: Path | None) -> bool:
    """Whether to compare: as asked, else where transformers can be imported.

    Raises:
        HuggingFaceError: asked for, and it cannot; or a ``text`` is given and nothing compared.
    """
    there = importlib.util.find_spec("transformers") is not None
    if asked and not there:
        raise HuggingFaceError(
            "--check compares with transformers: pip install 'fp8train[hf]', or --no-check"
        )
    checked = there if asked is None else asked
    if text is not None and not checked:
        raise HuggingFaceError("--text needs the comparison with transformers: --check")
    return checked


def their_logits(folder: Path) -> Logits:
    """transformers' model of a folder; FP8 weights are decoded by their formats' definition first.

    Raises:
        HuggingFaceError: transformers cannot read the folder.
    """
    with _quiet():
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            if getattr(config, "quantization_config", None) is None:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True
                )
            else:
                model = _decoded(transformers, config, folder)
        except Exception as error:  # of whatever kind a config.json provokes in another library
            reason = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
            raise HuggingFaceError(
                f"transformers {transformers.__version__} cannot load {folder}: {reason}; mend the folder's "
                "config.json, or leave the comparison out with --no-check"
            ) from error
    model = model.float().eval()

    def logits(tokens: Tensor) -> Tensor:
        with _quiet():
            found: Tensor = model(input_ids=tokens, use_cache=False).logits
        return found

    return logits


def _decoded(transformers: Any, config: Any, folder: Path) -> nn.Module:
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with WeightFiles(folder) as files:
        names = [name for name in files.names if not name.endswith(("_scale", "_scale_inv"))]
        missing, unexpected = model.load_state_dict(
            {name: decode(files, name) for name in names}, strict=False
        )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert (set(missing) - tied, unexpected) == (set(), []), f"{missing}, {unexpected}"
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what other libraries log, warn of and draw while they are imported and load a model.

    transformers, and torch and torchao when it imports them, have much to say about ids of special tokens,
    kernels and progress; the comparison that follows says whether any of it matters. Errors are raised, not
    logged.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as theirs

            shown = theirs.is_progress_bar_enabled()
            theirs.disable_progress_bar()
            try:
                yield
            finally:
                if shown:
                    theirs.enable_progress_bar()
    finally:
        logging.disable(disabled)


@torch.no_grad()
def decoder_in_fp32(run: TrainedRun, value: Callable[[str], Tensor]) -> Decoder:
    """A run's model in FP32 on the CPU, without FP8; ``value`` gives each parameter by its name."""
    plain = inference_config(run.config, "fp32")
    model = build_model(plain, vocab_size=run.vocab_size, device=torch.device("cpu")).model
    for fqn, parameter in model.named_parameters():
        parameter.copy_(value(fqn))
    return model.requires_grad_(False)


def fixed_tokens(vocab_size: int, max_seq_len: int) -> Tensor:
    """The tokens that are compared: int64 [2, S], the same for every model of these sizes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (_SEQUENCES, min(_LENGTH, max_seq_len)), generator=generator)


@torch.no_grad()
def compare(ours: Decoder, theirs: Logits, text: list[int] | None) -> Parity:
    """Run two models on :func:`fixed_tokens` and compare their logits and perplexities.

    Args:
        ours: one of them, in FP32.
        theirs: the other, of the same sizes.
        text: token ids, for perplexities; None leaves them out.
    """
    longest = ours.config.max_seq_len
    tokens = fixed_tokens(ours.vocab_size, longest)
    found, expected = ours.logits(tokens), theirs(tokens)
    difference = (found - expected).abs().max()
    both = None
    if text is not None:
        both = perplexity(ours.logits, text, longest), perplexity(theirs, text, longest)
    return Parity(
        float(difference if difference.isfinite() else math.inf),
        float(expected.abs().max()),
        tokens.numel(),
        both,
        0 if text is None else len(text) - 1,
    )


@torch.no_grad()
def perplexity(logits: Logits, text: list[int], max_seq_len: int) -> float:
    """exp of the mean loss of all tokens but the first, in pieces of at most ``max_seq_len`` tokens."""
    tokens = torch.tensor(text)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(text) - 1, max_seq_len):
        piece = tokens[start : start + max_seq_len + 1]
        scores = logits(piece[None, :-1])[0]
        total += F.cross_entropy(scores.double(), piece[1:], reduction="sum")
    return math.exp(float(total) / (len(text) - 1))


def check_passed(parity: Parity, what: str) -> None:
    """Raise unless the models compute the same.

    Raises:
        HuggingFaceError: they do not; ``what`` says what was not kept.
    """
    if not parity.passed:
        raise HuggingFaceError(
            f"{parity.lines()[0]}\nthe two models differ, so {what}; this is a fault of fp8train or of "
            "transformers: please report it with the config.json"
        )
