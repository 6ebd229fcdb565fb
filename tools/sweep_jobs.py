"""The runs of a learning-rate sweep: arms x widths x learning rates x seeds, as overrides of a configuration.

See ``tools/sweep_lr.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from dataclasses import dataclass, field

from sweep_table import format_lr

from fp8train.config.errors import UserError
from fp8train.config.overrides import COMMAND_LINE
from fp8train.config.resolve import load_config
from fp8train.config.schema import Config, to_plain

OWN_KEYS = {
    "model.hidden_size": "--widths",
    "optimizer.lr": "--lrs",
    "train.steps": "--steps",
    "train.tokens": "--steps",
    "train.eval_interval": "--loss",
    "run.seed": "--seeds",
    **dict.fromkeys(("run.name", "run.dir", "run.overwrite", "checkpoint.resume"), "--out"),
    "run.threads": "--jobs",
    **dict.fromkeys(("checkpoint.interval", "checkpoint.save_at_end"), "the sweep"),
    **dict.fromkeys(("logging.interval", "logging.tensorboard"), "the sweep"),
}
"""Keys that the sweep sets, and what they come from."""


@dataclass(frozen=True)
class Arm:
    """A variant of the configuration and its learning rates."""

    name: str
    overrides: tuple[str, ...]
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One run. ``fingerprint``: hash of its resolved configuration, all but where it is written."""

    arm: str
    width: int
    lr: float
    seed: int
    overrides: tuple[str, ...] = field(repr=False)
    fingerprint: str

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.arm}_w{self.width}_lr{self.lr:.6g}_s{self.seed}_{self.fingerprint[:8]}"

    def __str__(self) -> str:
        return f"{self.arm}, width {self.width}, lr {format_lr(self.lr)}, seed {self.seed}"


def parse_lr(text: str) -> float:
    """``2^-9``, ``2^-8.5`` or a plain number."""
    base, caret, exponent = text.partition("^")
    try:
        value = float(base) ** float(exponent) if caret else float(text)
    except (ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no learning rate; write 2^-9 or 0.002")
    return value


def parse_arm(text: str) -> tuple[str, tuple[str, ...]]:
    """``NAME`` or ``NAME: section.key=value ...``; a value with spaces needs none after its commas."""
    name, _, overrides = text.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name.strip()):
        raise argparse.ArgumentTypeError(f"{text!r}: an arm is NAME or 'NAME: section.key=value ...'")
    return name.strip(), tuple(overrides.split())


def with_width(text: str, width: int) -> str:
    """An override with ``{width}`` and ``{width^P}`` replaced by numbers."""
    return re.sub(
        r"\{width(?:\^([-+.\d]+))?\}",
        lambda found: str(width) if found[1] is None else f"{width ** float(found[1]):.9g}",
        text,
    )


def shape_overrides(base: Config, width: int, head_dim: int | None) -> list[str]:
    """The model's dimensions at ``width``.

    Raises:
        UserError: no whole number of heads fits; the message says what to change.
    """
    model = base.model
    per_head = head_dim or model.head_dim
    heads, rest = divmod(width * model.num_heads * model.head_dim, model.hidden_size * per_head)
    if rest or not heads:
        raise UserError(
            f"--widths {width}: not a whole number of heads of {per_head}; give multiples of it, or "
            "--head-dim"
        )
    kv_heads, rest = divmod(heads * model.num_kv_heads, model.num_heads)
    if rest or not kv_heads:
        raise UserError(
            f"--widths {width}: its {heads} heads cannot share keys as the configuration's {model.num_heads} "
            f"share {model.num_kv_heads}; choose a smaller --head-dim, or --overrides "
            f"model.num_kv_heads={model.num_heads}"
        )
    ffn = max(16, 16 * round(width * model.ffn_hidden_size / model.hidden_size / 16))
    return [
        f"model.hidden_size={width}",
        f"model.num_heads={heads}",
        f"model.num_kv_heads={kv_heads}",
        f"model.head_dim={per_head}",
        f"model.ffn_hidden_size={ffn}",
    ]


def plan(args: argparse.Namespace) -> list[Job]:
    """Every run of the sweep, its configuration validated.

    Raises:
        UserError: a configuration is wrong, or sets what the sweep sets.
    """
    jobs = []
    for arm in args.arms:
        for width in args.widths:
            given = [with_width(text, width) for text in (*args.overrides, *arm.overrides)]
            resolved = load_config(args.config, given)
            for key, option in OWN_KEYS.items():
                if resolved.origins[key] == COMMAND_LINE:
                    raise UserError(
                        f"arm {arm.name}: {key} is set by {option}; leave it out of the overrides"
                    )
            given += shape_overrides(resolved.config, width, args.head_dim)
            steps = args.steps or resolved.config.total_steps
            given += [f"train.steps={steps}", "train.tokens=null"]
            given += [f"train.eval_interval={steps if args.loss == 'valid' else 0}", "logging.interval=1"]
            given += ["run.threads=1", "logging.tensorboard=false", "checkpoint.interval=0"]
            given += ["checkpoint.save_at_end=false", "checkpoint.resume=never", "run.overwrite=true"]
            for lr in arm.lrs:
                for seed in args.seeds:
                    own = (*given, f"optimizer.lr={lr!r}", f"run.seed={seed}")
                    config = load_config(args.config, own).config
                    jobs.append(Job(arm.name, width, lr, seed, own, fingerprint(config)))
    return jobs


def fingerprint(config: Config) -> str:
    """Hash of everything in a configuration but its place."""
    plain = to_plain(config)
    for key in ("name", "dir"):
        del plain["run"][key]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
