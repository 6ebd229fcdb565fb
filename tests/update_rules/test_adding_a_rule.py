"""A new update rule is a file of its own and one name in the registry: nothing else of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.package_copy import copy_package, run_python

ELEMENT_RULE = '''
"""Signum: the sign of a momentum."""

from fp8train.update_rules.rule import Rule


class Signum(Rule):
    name = "signum"
    summary = "The sign of a momentum; for a test."
    has_second_moment = False

    def new_values(self, scalars, gradient, load):
        m = load("exp_avg").lerp_(gradient, 1 - self.settings.beta1)
        yield "exp_avg", m
        yield "master", load("master").mul_(1 - scalars.decay).sub_(m.sign(), alpha=scalars.lr)


RULE = Signum
'''

MATRIX_RULE = '''
"""A momentum, made nearly orthogonal by Newton and Schulz's iteration."""

from fp8train.update_rules.adamw import AdamW
from fp8train.update_rules.rule import MatrixRule


class Schulz(MatrixRule):
    name = "schulz"
    summary = "An orthogonal momentum; for a test."
    has_second_moment = False
    others_type = AdamW

    def new_values(self, scalars, gradient, load):
        m = load("exp_avg").lerp_(gradient, 1 - self.settings.beta1)
        x = m / (m.norm() + 1e-12)
        for _ in range(12):
            x = 1.5 * x - 0.5 * x @ x.T @ x
        yield "exp_avg", m
        yield "master", load("master").mul_(1 - scalars.decay).sub_(x, alpha=scalars.lr)


RULE = Schulz
'''

TRAIN = """
import sys
from pathlib import Path
import fp8train
assert Path(fp8train.__file__).parents[1] == Path(sys.argv[1])
from fp8train.config.explain import reference
assert sys.argv[3] in reference()
assert "torch" not in sys.modules
from tests.training.tiny import alone, losses, tiny_config
config = tiny_config([f"optimizer.name={sys.argv[2]}", "precision.level=O2"])
found, trainer = losses(config, alone(), 20)
print(found[0], found[-1], sorted(trainer.optimizer.states.roles))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and what the script needs of the tests."""
    copy_package(tmp_path, "tests/training/tiny.py")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "source", "roles"),
    [
        ("signum", ELEMENT_RULE, ["exp_avg", "master"]),
        ("schulz", MATRIX_RULE, ["exp_avg", "exp_avg_sq", "master"]),
    ],
)
def test_a_file_and_a_line_add_a_rule(copy: Path, name: str, source: str, roles: list[str]) -> None:
    rules = copy / "fp8train/update_rules"
    (rules / f"{name}.py").write_text(source.lstrip())
    registry = rules / "registry.py"
    old = 'RuleName = Literal["adamw", "lion"]'
    assert registry.read_text().count(old) == 1
    registry.write_text(registry.read_text().replace(old, old.replace("]", f', "{name}"]')))

    summary = source.split('summary = "')[1].split('"')[0]
    done = run_python(copy, "-c", TRAIN, str(copy), name, f"``{name}``: {summary}")
    assert done.returncode == 0, done.stderr
    first, last, kept = done.stdout.split(maxsplit=2)
    assert float(last) < float(first) - 0.3
    assert kept.strip() == str(roles)


def test_what_the_rule_does_not_read_or_bear_is_refused(copy: Path) -> None:
    (copy / "fp8train/update_rules/schulz.py").write_text(MATRIX_RULE.lstrip())
    registry = copy / "fp8train/update_rules/registry.py"
    registry.write_text(registry.read_text().replace('"lion"]', '"lion", "schulz"]'))
    tiny = copy / "tiny.yaml"
    tiny.write_text(
        "model: {family: llama, num_layers: 1, hidden_size: 64, num_heads: 4, vocab_size: 64}\n"
        "data: {prefix: none, seq_length: 16}\n"
        "optimizer: {lr: 0.01, name: schulz}\n"
        "train: {steps: 2, global_batch_size: 4, micro_batch_size: 1}\n"
    )
    refused = {
        "precision.state.exp_avg_sq.format=bf16": "optimizer.name is schulz",
        "parallel.tp=2": "schulz updates whole matrices, but parallel.tp (2) cuts them; write parallel.tp: 1",
        "parallel.zero=1": "write parallel.zero_partition: whole_tensor",
    }
    for override, message in refused.items():
        options = ["precision.level=O2", override] if "state" in override else [override]
        done = run_python(copy, "-m", "fp8train", "config", str(tiny), *options)
        assert done.returncode == 2 and message in done.stderr, (override, done.stderr)
    accepted = run_python(
        copy,
        "-m",
        "fp8train",
        "config",
        str(tiny),
        "parallel.zero=1",
        "parallel.zero_partition=whole_tensor",
        "optimizer.eps=1e-6",  # of its element rule
    )
    assert accepted.returncode == 0, accepted.stderr
