"""What ``train_step.py`` and ``profile_step.py`` are told: variants, which ``count_step.py`` counts, sizes,
limits of time."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from fp8train.config.resolve import load_config
from fp8train.config.schema import Config

VARIANTS = {
    "O0": ("precision.level=O0", "precision.gemm.fp8=false"),
    "FP8": ("precision.level=O0", "precision.gemm.fp8=true"),
    **{level: (f"precision.level={level}",) for level in ("O1", "O2", "O3")},
}
"""Overrides of a variant by its name, ``FP8`` being FP8 GEMMs only; ``--variant`` adds others."""
TINY = {"layers": [2], "micro_batch": 2, "seq": [64], "steps": 1, "rounds": 1, "warmup": 1, "vocab": 512}
DEFAULTS = {"vocab": 4096, "steps": 3, "rounds": 3, "warmup": 3}
SMALL = Path(__file__).parents[2] / "configs" / "small" / "llama.yaml"


@dataclass(frozen=True)
class Point:
    """What is measured of a variant: blocks, sequences of a micro-batch, their length."""

    layers: int
    micro_batch: int
    seq: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch * self.seq


def positive(text: str) -> int:
    """An integer from 1 up, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """What to measure, and how long."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=SMALL, help="default: a Llama of 3M parameters")
    parser.add_argument("--layers", type=positive, nargs="+", help="instead of model.num_layers")
    parser.add_argument(
        "--micro-batch", type=positive, help="instead of train.micro_batch_size; one per step"
    )
    parser.add_argument("--seq", type=positive, nargs="+", help="instead of data.seq_length")
    parser.add_argument("--memory", type=float, help="GiB that the largest micro-batch may take; CUDA")
    parser.add_argument("--vocab", type=positive, help="vocabulary where the configuration names none (4096)")
    parser.add_argument("--steps", type=positive, help="steps of one measurement (3)")
    parser.add_argument("--rounds", type=positive, help="measurements in a turn (3)")
    parser.add_argument("--turns", type=positive, default=2, help="how often each variant is built (2)")
    parser.add_argument("--warmup", type=positive, help="untimed steps of each variant (3)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="build nothing after this time")
    parser.add_argument("--patience", type=float, default=math.inf, help="no further round after this time")
    parser.add_argument("--compile", action="store_true", help="train.compile: block")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: all cores")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", default=["O0", "FP8"], help=", ".join(VARIANTS)
    )
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help="one more"
    )
    parser.add_argument("--tiny", action="store_true", help=f"sizes for a quick look: {TINY}")
    parser.add_argument(
        "--predict", metavar="GPU", help="count instead, for this GPU of tools/bench/ceilings.py"
    )
    parser.add_argument("--predictions", type=Path, help="what --predict wrote")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as in fp8train train")
    return parser


def finish_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line: defaults filled in, and ``chosen``, the variants' overrides by name."""
    args = parser.parse_args()
    for name, value in (TINY if args.tiny else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    known = {name: VARIANTS[name] for name in args.variants if name in VARIANTS}
    args.chosen = known | {name: tuple(overrides) for name, *overrides in args.variant}
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"--variants: no {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    return args


def overrides_of(args: argparse.Namespace, name: str, micro_batch: int, seq: int) -> list[str]:
    """Everything on the command line that a variant's configuration is laid over with, layers apart."""
    overrides = ["logging.cast_statistics_interval=0", *args.chosen[name]]
    overrides += ["train.compile=block"] if args.compile else []
    overrides += args.overrides
    return [
        *overrides,
        f"data.seq_length={seq}",
        f"train.micro_batch_size={micro_batch}",
        f"train.global_batch_size={micro_batch}",
    ]


def make_config(args: argparse.Namespace, name: str, point: Point) -> Config:
    """The configuration with the command line laid over it.

    Raises:
        ConfigError: as ``fp8train config`` would.
    """
    overrides = overrides_of(args, name, point.micro_batch, point.seq)
    return load_config(args.config, [*overrides, f"model.num_layers={point.layers}"]).config


def points_of(args: argparse.Namespace) -> list[Point]:
    """All sizes of the command line; the file's where it names none."""
    own = load_config(args.config, args.overrides).config
    micro_batch = args.micro_batch or own.train.micro_batch_size
    return [
        Point(layers, micro_batch, seq)
        for layers in args.layers or [own.model.num_layers]
        for seq in args.seq or [own.data.seq_length]
    ]
