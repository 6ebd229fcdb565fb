"""How evenly ZeRO's two partitions load the data-parallel ranks: largest load divided by the mean.

    python tools/zero_balance.py [configs/llama/llama3_8b.yaml ...]

Counts the matrices of the FP8 plan, whose states are what ZeRO is for; embedding and head are always cut by
rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fp8train.config.resolve import load_config
from fp8train.models.build import outline
from fp8train.parallel.zero import Partition, partition

ROOT = Path(__file__).resolve().parent.parent
PRESETS = [ROOT / "configs/gpt/7b.yaml", ROOT / "configs/llama/llama3_8b.yaml"]
RANKS = (8, 16, 32, 64, 128, 256, 512)


def hidden_matrices(path: Path) -> dict[str, tuple[int, ...]]:
    """``{fqn: shape}`` of the hidden linears' weights of a configuration."""
    config = load_config(path).config
    model = outline(config, config.model.vocab_size or 1)
    return {f"{name}.weight": tuple(linear.weight.shape) for name, linear in model.linears().items()}


def imbalance(shared: Partition) -> float:
    """Largest load divided by the mean: what the slowest rank costs, 1 at best."""
    loads = shared.loads()
    return max(loads) / (sum(loads) / len(loads))


def table(paths: list[Path]) -> str:
    """Markdown, a row for each configuration and partition."""
    lines = ["| model | matrices | partition | " + " | ".join(f"DP {n}" for n in RANKS) + " |"]
    lines.append("|---" * (3 + len(RANKS)) + "|")
    for path in paths:
        shapes = hidden_matrices(path)
        for kind in ("whole_tensor", "rows"):
            numbers = [f"{imbalance(partition(shapes, ranks, kind)):.2f}" for ranks in RANKS]
            name = f"{path.parent.name}/{path.stem}"
            lines.append(f"| {name} | {len(shapes)} | {kind} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", type=Path, default=PRESETS)
    print(table(parser.parse_args().configs))


if __name__ == "__main__":
    main()
