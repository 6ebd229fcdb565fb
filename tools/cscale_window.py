"""Validation loss of a trained model against one constant FP8 scale: the CSCALE window.

Perez et al. 2023 (arXiv 2309.17224) ask whether FP8 inference needs a scale per tensor at all, or whether one
constant power of two serves every weight and activation (FP8-CSCALE). It does inside a window of exponents:
above it values saturate, below it they flush to zero. This tool evaluates a checkpoint

* in high precision, the reference,
* in FP8 with a scale per tensor from its own amax (FP8-AMAX), and
* in FP8 with the constant scale ``2^k`` for each k of a range: for weights and activations alike, or with
  ``--operands x`` / ``w`` for one of them while the other keeps the scales of its amax,

all in one process on the same validation batches, and prints, plots and writes the losses with the window:
the longest run of neighbouring k whose loss exceeds the reference by at most 0.5 % (``--tolerance``).

    python tools/cscale_window.py RUN_OR_CHECKPOINT [--exponents -12 12] [--operands both x w] [--batches 16]

Weights are the master weights rounded to the compute type and then cast, whatever level trained them, so that
all evaluations start from the same numbers. FP8 covers the linears that were trained in FP8; of a model that
was trained without, all hidden linears. The amax evaluation also leaves its cast statistics in the run
directory (``inference_casts.jsonl``), from which ``fp8train report scales`` draws the scales at inference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fp8train.checkpoint.description import read_meta_file
from fp8train.comm.collectives import alone
from fp8train.comm.processes import Processes, choose_device, choose_threads
from fp8train.config.errors import UserError
from fp8train.config.linear_names import linears_in_fp8
from fp8train.config.schema import Config
from fp8train.data.loading import Data, open_data
from fp8train.evaluation.validation import Text, evaluate
from fp8train.inference.load import resolve_checkpoint
from fp8train.inference.stored_states import StoredStates
from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.layers.linear import Fp8Plan
from fp8train.models.build import COMPUTE_DTYPES, BuiltModel, build_model
from fp8train.models.decoder import Decoder
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import MAX_CONSTANT, QuantSpec
from fp8train.reporting.cast_log import INFERENCE_LOG
from fp8train.reporting.scales import REPORT_DIR
from fp8train.run_dir.claim import STATUS_FILE
from fp8train.run_dir.metrics import strict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules beside it only

from tools.cscale_report import find_window, plot_windows, summary  # noqa: E402

OPERANDS = ("both", "x", "w")


class Evaluator:
    """A checkpoint's model and validation data, and its loss under any FP8 plan.

    Attributes:
        checkpoint: its directory.
        step: optimizer steps of training.
        model: in high precision, with the checkpoint's weights.
        linears: those of it that FP8 covers, by module path.
        tokens: target tokens of an evaluation; 0 before the first.
    """

    def __init__(self, path: Path, *, device: torch.device, data: str | None, batches: int | None) -> None:
        """Args: ``path``: checkpoint or run directory; ``data``: dataset prefix to evaluate on instead of the
        run's validation split; ``batches``: global batches, by default the run's ``train.eval_batches``."""
        self.checkpoint, self.device = resolve_checkpoint(path), device
        _, meta = read_meta_file(self.checkpoint)
        self.config = _config_of(self.checkpoint, meta)
        self.batches = batches or self.config.train.eval_batches
        self.data = _open(self.config, int(meta["vocab_size"]), data)
        try:
            self.backend = choose_gemm_backend(device, COMPUTE_DTYPES[self.config.precision.compute])
        except ValueError as error:  # the device cannot multiply in FP8
            raise UserError(str(error)) from None
        self.vocab_size = int(meta["vocab_size"])
        self.model, self.step = _load(self.checkpoint, self.config, self.vocab_size, device)
        covered, linears = linears_in_fp8(self.config), self.model.linears()
        self.linears = {path: linear for path, linear in linears.items() if not covered or path in covered}
        self.tokens = 0

    def loss(self, quant: LinearQuant | None, recorder: CastRecorder | None = None) -> float:
        """Mean nats per token with all linears quantised by ``quant``; None: in high precision. ``recorder``:
        for statistics of the casts."""
        model = self.model if quant is None else self._quantised(quant, recorder)
        ignore_after = self.data.eod_id if self.config.data.mask_end_of_document else None
        assert self.data.valid is not None
        text = Text(self.data.valid, self.batches, ignore_after, token_lengths=None)
        processes = Processes(self.device, 1, 0, alone(), None)
        result = evaluate(partial(self._summed_loss, model), text, processes)
        self.tokens = result.tokens
        return result.loss

    @torch.no_grad()
    def _quantised(self, quant: LinearQuant, recorder: CastRecorder | None) -> Decoder:
        """A model of the same weights that runs like this: linears are connected once, so each plan has its
        own."""
        built = _build(self.config, self.vocab_size, self.device, fp8=self.config.precision.gemm.fp8)
        for path, linear in built.model.linears().items():
            if path not in self.linears:
                continue
            holding = "cached" if built.fp8 is None else built.fp8.plans[path].holding
            plan = Fp8Plan(quant, self.backend, holding)
            weight = linear.make_fp8_weight(plan, scale_state=None, recorder=recorder)
            linear.connect(plan=plan, weight=weight, recorder=recorder)
        own = dict(self.model.named_parameters())
        for fqn, parameter in built.model.named_parameters():
            parameter.copy_(own[fqn])
        return built.model

    def _summed_loss(self, model: Decoder, inputs: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, y in zip(inputs, targets, strict=True):
            total += model(x, y)
        return total

    def amax_loss(self) -> tuple[float, dict[str, dict[str, float]]]:
        """Loss with a scale per tensor, and the statistics of the last micro-batch's casts by site."""
        sites = [f"{path}/{operand}" for path in self.linears for operand in ("x", "w", "grad_output")]
        recorder = CastRecorder(sites, self.device)
        recorder.active = True
        loss = self.loss(LinearQuant(), recorder)
        recorder.active = False
        return loss, recorder.collect()


def _config_of(checkpoint: Path, meta: Mapping[str, Any]) -> Config:
    if "config" not in meta or "vocab_size" not in meta:
        raise UserError(f"{checkpoint}: not a checkpoint of a training run: no config and vocab_size in it")
    try:
        return Config.model_validate(meta["config"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{checkpoint}: its configuration does not fit this version of fp8train: {key}: {first['msg']}"
        ) from None


def _open(config: Config, vocab_size: int, prefix: str | None) -> Data:
    section = config.data
    if prefix is not None:  # all of it; the training split is opened too, and never read
        change = {"prefix": prefix, "valid_prefix": prefix, "blend": None, "split": (1.0, 0.0, 0.0)}
        section = section.model_copy(update=change)
    data = open_data(
        section,
        vocab_size=vocab_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=config.run.seed,
        total_steps=config.total_steps,
    )
    if data.valid is None:
        raise UserError("the run has no validation split (data.split); name a dataset with --data PREFIX")
    return data


def _build(config: Config, vocab_size: int, device: torch.device, *, fp8: bool) -> BuiltModel:
    """The model without values; with ``fp8`` the run's FP8 plan is made."""
    gemm = config.precision.gemm.model_copy(update={"fp8": fp8})
    precision = config.precision.model_copy(update={"weights": "compute", "gemm": gemm})
    train = config.train.model_copy(update={"compile": "off", "activation_checkpointing": "none"})
    plain = config.model_copy(update={"precision": precision, "train": train})
    return build_model(plain, vocab_size=vocab_size, device=device)


@torch.no_grad()
def _load(checkpoint: Path, config: Config, vocab_size: int, device: torch.device) -> tuple[Decoder, int]:
    """The model in high precision with its master weights rounded to the compute type, and its step."""
    model = _build(config, vocab_size, device, fp8=False).model
    states = StoredStates(config, vocab_size, checkpoint)
    for fqn, parameter in model.named_parameters():
        parameter.copy_(states.read(fqn))
    return model, states.opened.manifest.step


def constant_quant(exponent: int, operands: str) -> LinearQuant:
    """``2^exponent`` for weights, activations or both; the other keeps the scale of its amax."""
    fixed = QuantSpec(E4M3, scale_source="constant", constant_exponent=exponent)
    x = fixed if operands in ("both", "x") else QuantSpec(E4M3)
    w = fixed if operands in ("both", "w") else QuantSpec(E4M3)
    return LinearQuant(output_x=x, grad_weight_x=x, output_w=w, grad_input_w=w)


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate everything, telling each loss as it comes."""
    evaluator = Evaluator(
        args.path, device=choose_device(args.device, 0), data=args.data, batches=args.batches
    )
    reference = evaluator.loss(None)
    print(f"{evaluator.checkpoint}: {len(evaluator.linears)} linears, {evaluator.tokens:,} target tokens")
    print(f"high precision      {reference:.4f}")
    amax, casts = evaluator.amax_loss()
    print(f"FP8, scales by amax {amax:.4f} ({amax / reference - 1:+.2%})", flush=True)
    _keep_casts(evaluator, casts)
    for operand in ("x", "w"):
        scales = [row["log2_scale"] + 0.0 for site, row in casts.items() if site.endswith(f"/{operand}")]
        print(f"  k that amax chooses for {operand}: {min(scales):g} .. {max(scales):g}")
    result: dict[str, Any] = {"checkpoint": str(evaluator.checkpoint), "step": evaluator.step}
    result |= {"name": _run_of(evaluator.checkpoint).name, "tokens": evaluator.tokens}
    result |= {"high_precision": reference, "amax": amax, "tolerance": args.tolerance, "sweeps": {}}
    for operands in args.operands:
        losses: dict[int, float] = {}
        for k in range(args.exponents[0], args.exponents[1] + 1):
            losses[k] = evaluator.loss(constant_quant(k, operands))
            change = f"{losses[k] / reference - 1:+.2%}"
            print(f"constant 2^{k:<4d} for {operands:<4}  {losses[k]:.4f} ({change})", flush=True)
        window = find_window(losses, reference, args.tolerance)
        result["sweeps"][operands] = {
            "losses": {str(k): strict(loss) for k, loss in losses.items()},
            "window": None if window is None else [window.low, window.high],
            "text": "none" if window is None else str(window),
        }
    return result


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.resolve().parent.parent


def _keep_casts(evaluator: Evaluator, casts: Mapping[str, Mapping[str, float]]) -> None:
    """Leave the casts in the run directory, if the checkpoint lies in one."""
    run = _run_of(evaluator.checkpoint)
    if not (run / STATUS_FILE).exists():
        return
    rows = ({"step": evaluator.step, "site": site} | _strict(row) for site, row in casts.items())
    (run / INFERENCE_LOG).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"  their statistics: {run / INFERENCE_LOG}  (fp8train report scales {run})")


def _strict(row: Mapping[str, float]) -> dict[str, float | str]:
    return {name: strict(value) for name, value in row.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="checkpoint, or run directory for its newest one")
    parser.add_argument("--exponents", nargs=2, type=int, default=[-12, 12], metavar=("LOW", "HIGH"))
    parser.add_argument("--operands", nargs="+", choices=OPERANDS, default=["both"])
    parser.add_argument("--batches", type=int, help="global batches; default: the run's train.eval_batches")
    parser.add_argument("--data", metavar="PREFIX", help="dataset; default: the run's validation split")
    parser.add_argument("--tolerance", type=float, default=0.005, help="relative to the reference loss")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: usable cores")
    parser.add_argument("--out", type=Path, help="folder for cscale.json, cscale.png; default: RUN/report")
    args = parser.parse_args()
    low, high = args.exponents
    if not -MAX_CONSTANT <= low <= high <= MAX_CONSTANT:
        parser.error(f"--exponents {low} {high}: give LOW <= HIGH within -{MAX_CONSTANT} .. {MAX_CONSTANT}")
    if args.batches is not None and args.batches < 1:
        parser.error(f"--batches {args.batches}: give 1 or more")
    if not (math.isfinite(args.tolerance) and args.tolerance > 0):
        parser.error(f"--tolerance {args.tolerance}: give a positive number such as 0.005")
    return args


def main() -> None:
    args = parse_arguments()
    try:
        torch.set_num_threads(choose_threads(args.threads, 1))
        result = sweep(args)
        out: Path = args.out or _run_of(Path(result["checkpoint"])) / REPORT_DIR
        out.mkdir(parents=True, exist_ok=True)
        (out / "cscale.json").write_text(json.dumps(result, indent=1) + "\n")
        plot_windows(result, out / "cscale.png")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(UserError.exit_status) from None
    print(f"\n{summary(result)}\nwrote {out / 'cscale.json'}\nwrote {out / 'cscale.png'}")


if __name__ == "__main__":
    main()
