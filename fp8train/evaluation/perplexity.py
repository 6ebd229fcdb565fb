"""The perplexity of a checkpoint, as it was trained and in BF16: ``fp8train eval``.

It reads the samples that training validates on (:mod:`~fp8train.evaluation.validation`), in its batches. So
the loss in the run's own numerics is the one that the run logged: the same bits where training ran in one
process, uncompiled, on the same device and threads; where it was cut over ranks or compiled, the same up to
the order of sums in high precision and FP8 traffic (:mod:`fp8train.inference.weights`). Another batch size
changes a loss slightly where scales are current, because then an activation's scale is that of its whole
micro-batch.

``perplexity = exp(loss)``, so the relative difference of two perplexities is ``expm1`` of the difference of
losses.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup, alone
from fp8train.comm.processes import Processes
from fp8train.config.data_schema import DataConfig
from fp8train.data.batches import GlobalBatches
from fp8train.data.indexed_dataset import IndexedDataset, idx_path
from fp8train.data.loading import SplitName, open_split, prefixes_of
from fp8train.data.sidecar import read_sidecar
from fp8train.data.tokenizer import Tokenizer
from fp8train.evaluation.progress import Progress
from fp8train.evaluation.validation import Evaluation, Text, batch_totals, evaluation_of
from fp8train.inference.errors import InferenceError
from fp8train.inference.load import TrainedRun
from fp8train.inference.weights import Numerics
from fp8train.run_dir.metrics import strict


@dataclass(frozen=True)
class Measurement:
    """How well one model did on one text.

    Attributes:
        numerics: how it was loaded.
        operands: the same in words.
        evaluation: loss and tokens.
        seconds: of the evaluation, loading left out.
    """

    numerics: Numerics
    operands: str
    evaluation: Evaluation
    seconds: float

    @property
    def perplexity(self) -> float:
        """The perplexity ``exp(loss)``."""
        return self.evaluation.metrics()["eval/perplexity"]

    def plain(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        bits = self.evaluation.bits_per_byte
        return {
            "numerics": self.numerics,
            "operands": self.operands,
            "loss": strict(self.evaluation.loss),
            "perplexity": strict(self.perplexity),
            "bits_per_byte": None if bits is None else strict(bits),
            "tokens": self.evaluation.tokens,
            "seconds": self.seconds,
        }


def open_text(
    run: TrainedRun,
    split: SplitName = "valid",
    *,
    num_batches: int | None = None,
    prefix: str | None = None,
    batch_size: int | None = None,
) -> Text:
    """The samples to evaluate on: by default those of the run's own validation.

    Args:
        run: whose data.
        split: which part of it.
        num_batches: batches of ``train.global_batch_size`` samples, fewer if there are fewer; default:
            ``train.eval_batches``.
        prefix: a dataset to read instead.
        batch_size: samples per forward; default: ``train.micro_batch_size``.

    Raises:
        InferenceError: the data is not there or is not in the model's tokens, or ``batch_size`` does not
            divide the samples.
        DataError: it is damaged or too small, or there is no such split.
    """
    config, train = _data_config(run, split, prefix), run.config.train
    opened = open_split(
        config,
        split,
        vocab_size=run.vocab_size,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=run.config.run.seed,
    )
    batches = opened.batches
    count = min(num_batches or train.eval_batches, batches.batches_per_epoch)
    if batch_size is not None:
        total = count * train.global_batch_size
        if total % batch_size:
            legal = [size for size in range(1, total + 1) if total % size == 0]
            nearest = sorted(legal, key=lambda size: abs(size - batch_size))[:2]
            raise InferenceError(
                f"--batch-size {batch_size} does not divide the {total} samples to evaluate; "
                f"nearest that do: {', '.join(map(str, sorted(nearest)))}"
            )
        batches = GlobalBatches(
            batches.samples,
            global_batch_size=batch_size,
            micro_batch_size=batch_size,
            dp_rank=0,
            dp_size=1,
            vocab_size=run.vocab_size,
            masked=config.kind == "sft",
        )
        count = total // batch_size
    ignore_after = opened.eod_id if config.mask_end_of_document else None
    return Text(batches, count, ignore_after, opened.token_lengths)


def _data_config(run: TrainedRun, split: SplitName, prefix: str | None) -> DataConfig:
    """The run's ``data`` section with the datasets and the tokenizer that are here now."""
    config = run.config.data
    if prefix is not None:
        key = "valid_prefix" if split == "valid" and config.valid_prefix is not None else "prefix"
        config = config.model_copy(update={"blend": None, key: prefix})
    for name in prefixes_of(config, split):
        if not idx_path(name).is_file():
            raise InferenceError(
                f"{idx_path(name)}: no such file; "
                + ("check --prefix" if prefix else "the run's dataset is not here: name one with --prefix")
            )
    tokenizer = None if run.tokenizer_file() is None else run.tokenizer()
    for name in prefixes_of(config, split):
        _check_tokens(name, run, tokenizer)
    return config.model_copy(update={"tokenizer": None if tokenizer is None else str(tokenizer.path)})


def _check_tokens(prefix: str, run: TrainedRun, tokenizer: Tokenizer | None) -> None:
    """Refuse a dataset whose ids mean something else to the model."""
    sidecar = read_sidecar(IndexedDataset(prefix))
    if sidecar is None:
        return
    if tokenizer is not None and sidecar.tokenizer_sha256 != tokenizer.sha256:
        raise InferenceError(
            f"dataset {prefix} was made with another tokenizer (sha256 {sidecar.tokenizer_sha256[:12]}) than "
            f"the model's (sha256 {tokenizer.sha256[:12]}); make it again with "
            f"fp8train data prepare --tokenizer {tokenizer.path}"
        )
    if sidecar.vocab_size > run.vocab_size:
        raise InferenceError(
            f"dataset {prefix} has a vocabulary of {sidecar.vocab_size} tokens, but the model in {run.path} "
            f"knows {run.vocab_size}; make the dataset again with the model's tokenizer"
        )


def measure(
    run: TrainedRun,
    text: Text,
    numerics: Numerics,
    *,
    device: torch.device,
    ranks: CountedGroup | None = None,
) -> Measurement:
    """Load the model in these numerics and evaluate it. A long evaluation reports on stderr.

    Several ranks take whole batches in turn and their totals are added in the order of batches, so the result
    is that of one process to the bit, at equal threads.

    Args:
        run: the checkpoint.
        text: what to read.
        numerics: ``matched`` or ``bf16``.
        device: where to run.
        ranks: processes that share the work; None: this one alone.

    Raises:
        UserError: what :meth:`~fp8train.inference.load.TrainedRun.load` refuses; a token outside the
            vocabulary.
    """
    ranks = alone() if ranks is None else ranks
    built = run.load(numerics, device=device)
    mine = range(ranks.rank, text.num_batches, ranks.size)
    model, progress = built.model, Progress(numerics, len(mine), quiet=ranks.rank > 0)

    def summed_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for x, y in zip(inputs, targets, strict=True):  # as Trainer.summed_loss
            total += model(x, y)
        progress.advance(inputs.numel())
        return total

    began, one_process = time.perf_counter(), Processes(device, 1, 0, alone(), None)
    rows = torch.zeros(text.num_batches, 3, dtype=torch.float64)
    for number in mine:
        rows[number] = batch_totals(summed_loss, text, number, one_process)
    rows = rows.to(device)
    ranks.all_reduce(rows, purpose="loss")()  # every row is zero but on one rank, so the sum is exact
    totals = torch.zeros(3, dtype=torch.float64)
    for row in rows.cpu():
        totals += row
    evaluation = evaluation_of(*totals.tolist())
    return Measurement(numerics, run.describe(numerics, built), evaluation, time.perf_counter() - began)


def relative_difference(measured: Measurement, reference: Measurement) -> float:
    """By how much of the reference's perplexity ``measured`` is worse."""
    return math.expm1(measured.evaluation.loss - reference.evaluation.loss)
