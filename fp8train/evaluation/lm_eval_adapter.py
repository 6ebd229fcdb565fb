"""A checkpoint as a model of EleutherAI's lm-evaluation-harness (extra ``eval``).

lm-eval finds models by name in a registry that only imports fill: it has no plug-in entry points, so its own
command cannot know this class. This module is the same command with the name ``fp8train`` registered::

    python -m fp8train.evaluation.lm_eval_adapter --model fp8train \\
        --model_args path=runs/NAME,numerics=matched --tasks piqa --batch_size 8

From Python, importing the module is enough: ``lm_eval.simple_evaluate(model="fp8train", model_args=...)``, or
pass an instance. Tokens, windows and scores are those of ``fp8train eval``
(:mod:`fp8train.evaluation.scoring`), which follow lm-eval's conventions. One process: ``fp8train eval``
shares tasks over several.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from fp8train.comm.collectives import alone
from fp8train.comm.processes import choose_device
from fp8train.config.environment import world_from_environment
from fp8train.evaluation.progress import Progress
from fp8train.evaluation.scoring import Request, Score, encode_pair, score
from fp8train.evaluation.text import windows
from fp8train.inference.errors import InferenceError
from fp8train.inference.generate import generate
from fp8train.inference.load import open_run
from fp8train.inference.sampling import Sampling
from fp8train.inference.weights import Numerics

DEFAULT_NEW_TOKENS = 256


@register_model("fp8train")
class Fp8TrainLM(LM):  # type: ignore[misc]
    """A trained model that lm-eval can ask for log-probabilities and continuations.

    Args:
        path: checkpoint, or run directory for its newest good one.
        numerics: ``matched`` or ``bf16``, see :mod:`fp8train.inference.weights`.
        batch_size: requests per forward; default (and ``auto``): ``train.micro_batch_size``.
        device: ``auto``, ``cpu`` or ``cuda``.
        max_length: tokens read at once; default: ``model.max_seq_len``.
        max_batch_size: lm-eval passes it; batches are not sized automatically here, so it is refused.

    Raises:
        UserError: the checkpoint cannot be loaded, or there are several processes.
    """

    def __init__(
        self,
        path: str,
        numerics: Numerics = "matched",
        batch_size: int | str | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if world_from_environment().size > 1:
            raise InferenceError("lm-eval runs in one process here; fp8train eval --tasks uses several")
        if numerics not in ("matched", "bf16"):
            raise InferenceError(f"numerics={numerics}: choose matched or bf16")
        if max_batch_size is not None:
            raise InferenceError("max_batch_size has no meaning here; give batch_size")
        run = open_run(Path(path))
        self.tokenizer = run.tokenizer()
        self.model = run.load(numerics, device=choose_device(device or "auto", 0)).model
        longest = self.model.config.max_seq_len
        self.max_length = longest if max_length is None else int(max_length)
        if not 1 <= self.max_length <= longest:
            raise InferenceError(f"max_length={max_length}: the model's context is {longest} tokens")
        given = None if batch_size in (None, "auto") else int(cast(int, batch_size))
        self.batch_size = given or run.config.train.micro_batch_size
        self._device = self.model.embedding.weight.device

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer, for lm-eval's cache of requests."""
        return self.tokenizer.sha256

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(summed log-probability, all tokens likeliest) of a continuation after a context.

        Args:
            requests: ``args`` are (context, continuation).
            disable_tqdm: no progress on stderr.

        Raises:
            InferenceError: a continuation is empty, or longer than the model's context.
        """
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        scores = self._score([pair.fitted(self.max_length) for pair in pairs], quiet=disable_tqdm)
        answers = [(one.log_prob, one.greedy) for one in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts after the end-of-document id, in windows that do not overlap.

        Args:
            requests: ``args`` are (text,).
            disable_tqdm: no progress on stderr.
        """
        cut = [
            list(
                windows(
                    self.tokenizer.encode(request.args[0]),
                    before=self.tokenizer.eod_id,
                    context_length=self.max_length,
                    stride=self.max_length,
                )
            )
            for request in requests
        ]
        rest = iter(self._score([one for parts in cut for one in parts], quiet=disable_tqdm))
        answers = [sum(next(rest).log_prob for _ in parts) for parts in cut]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string (left out), the end of the document, or the token limit.

        Args:
            requests: ``args`` are (context, settings); of the settings ``until``, ``max_gen_toks``,
                ``do_sample``, ``temperature``, ``top_k`` and ``top_p`` are read, others refused.
            disable_tqdm: no progress on stderr.

        Raises:
            InferenceError: an unknown setting.
        """
        progress = Progress("generate", len(requests), unit="texts", quiet=disable_tqdm)
        answers = []
        for request in requests:
            answers.append(self._continue(*request.args))
            progress.advance(len(self.tokenizer.encode(answers[-1])))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        settings = dict(settings)
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        new = int(settings.pop("max_gen_toks", DEFAULT_NEW_TOKENS))
        temperature = float(settings.pop("temperature", 1.0 if settings.get("do_sample") else 0.0))
        if not settings.pop("do_sample", temperature > 0):
            temperature = 0.0
        sampling = Sampling(temperature, settings.pop("top_k", None), settings.pop("top_p", None))
        if settings:
            raise InferenceError(f"generation settings that are not known here: {', '.join(settings)}")
        prompt = self.tokenizer.encode(context) or [self.tokenizer.eod_id]
        new = min(new, self.max_length)
        prompt = prompt[-max(1, self.max_length + 1 - new) :]

        def stopped(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens)
            return any(stop in text for stop in stops)

        [tokens] = generate(
            self.model,
            prompt,
            max_tokens=new,
            sampling=sampling,
            generator=torch.Generator().manual_seed(0),
            eod_id=self.tokenizer.eod_id,
            vocab_size=self.tokenizer.vocab_size,
            stop=stopped,
        )
        text = self.tokenizer.decode(tokens)
        for stop in stops:
            text = text.split(stop, 1)[0]
        return text

    def _score(self, requests: Sequence[Request], *, quiet: bool) -> list[Score]:
        progress = Progress("score", -(-len(requests) // self.batch_size), quiet=quiet)
        return score(
            self.model,
            requests,
            batch_size=self.batch_size,
            pad_id=self.tokenizer.eod_id,
            ranks=alone(),
            advance=progress.advance,
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
