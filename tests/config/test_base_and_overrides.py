"""``base:`` files and command-line overrides: who wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.config.loader import MAX_INCLUDES
from fp8train.config.resolve import load_config
from tests.config.examples import MINIMAL, message_of, write


def test_including_file_wins_and_origins_name_the_file(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    path = write(tmp_path, "base: base.yaml\noptimizer:\n  beta1: 0.8\ntrain: {steps: 20}\n")
    resolved = load_config(path)
    assert resolved.config.optimizer.lr == 3e-4
    assert resolved.config.optimizer.beta1 == 0.8
    assert resolved.config.train.steps == 20
    assert resolved.config.train.micro_batch_size == 4
    names = {key: str(origin).replace(f"{tmp_path}/", "") for key, origin in resolved.origins.items()}
    assert names["optimizer.lr"] == "base.yaml:10"
    assert names["optimizer.beta1"] == "run.yaml:3"
    assert names["train.steps"] == "run.yaml:4"
    assert names["train.micro_batch_size"] == "base.yaml:14"
    assert resolved.sources == (str(tmp_path / "base.yaml"), str(path))


def test_bases_are_relative_chained_and_later_wins(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "a/root.yaml")
    write(tmp_path, "base: root.yaml\nrun: {seed: 1, name: one}\ndata: {split: [1, 1, 1]}\n", "a/one.yaml")
    write(tmp_path, "run: {seed: 2}\ndata: {split: [1, 0, 0]}\n", "two.yaml")
    config = load_config(write(tmp_path, "base: [a/one.yaml, two.yaml]\nrun: {dir: out}\n")).config
    assert (config.run.seed, config.run.name, config.run.dir) == (2, "one", "out")
    assert config.data.split == (1.0, 0.0, 0.0)


def test_null_takes_back_what_a_base_set(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "run: {seed: 7}\nschedule: {warmup_steps: 3}\n", "base.yaml")
    path = write(
        tmp_path,
        "base: base.yaml\nrun: {seed: null}\ntrain: {steps: null, tokens: 512}\nschedule: "
        "{warmup_steps: null}\n",
    )
    resolved = load_config(path)
    assert resolved.config.run.seed == 1234
    assert str(resolved.origins["run.seed"]) == "default"
    assert resolved.config.train.steps is None
    assert resolved.config.total_steps == 2
    assert resolved.config.schedule.warmup_steps is None


def test_a_null_that_takes_nothing_back_is_refused(tmp_path: Path) -> None:
    assert message_of(write(tmp_path, MINIMAL), "run.seed=null") == (
        "command line: run.seed: expected a whole number >= 0; got null; give a value or remove the line"
    )


def test_the_last_value_of_an_error_is_located(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL.replace("lr: 3e-4", "lr: -1"), "base.yaml")
    assert message_of(write(tmp_path, "base: base.yaml\n")) == (
        "base.yaml:10: optimizer.lr: expected a number > 0; got -1"
    )


def test_contradiction_across_files_names_both(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    message = message_of(write(tmp_path, "base: base.yaml\ntrain:\n  tokens: 512\n"))
    assert message == (
        "base.yaml:12: train.steps, train.tokens: set exactly one of train.steps and train.tokens; to use "
        "the tokens write train.steps=null, to use the steps train.tokens=null (train.tokens: run.yaml:3)"
    )


BASE_CASES = {
    "absent": (
        "run: {seed: 1}\nbase: nowhere.yaml\n",
        "run.yaml:2: base: config file not found: nowhere.yaml; ",
    ),
    "itself": (
        "base: run.yaml\n",
        "run.yaml:1: base: files include each other in a circle: run.yaml -> run.yaml",
    ),
    "number": (
        "base: 3\n",
        "run.yaml:1: base: expected a file name or a list of them; for example  base: llama.yaml",
    ),
    "null": (
        "base:\n",
        "run.yaml:1: base: expected a file name or a list of them; for example  base: llama.yaml",
    ),
    "list_of_lists": (
        "base:\n  - a.yaml\n  - [b]\n",
        "run.yaml:3: base: expected a file name or a list of them; for example  base: llama.yaml",
    ),
    "empty_list": ("base: []\n", "run.yaml:1: base: the list is empty; name a file or remove the line"),
    "folder": ("base: .\n", "run.yaml:1: base: "),
    "syntax": ("base: broken.yaml\n", "broken.yaml:1:5: YAML syntax error"),
}


@pytest.mark.parametrize("name", BASE_CASES)
def test_bad_base(name: str, tmp_path: Path) -> None:
    text, expected = BASE_CASES[name]
    write(tmp_path, "a: b: c\n", "broken.yaml")
    write(tmp_path, MINIMAL, "a.yaml")
    assert message_of(write(tmp_path, text)).startswith(expected)


def test_cycle_is_printed(tmp_path: Path) -> None:
    write(tmp_path, "base: c.yaml\n", "b.yaml")
    write(tmp_path, "base: run.yaml\n", "c.yaml")
    assert message_of(write(tmp_path, "base: b.yaml\n")) == (
        "c.yaml:1: base: files include each other in a circle: run.yaml -> b.yaml -> c.yaml -> run.yaml"
    )


def test_exponential_inclusion_is_bounded(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "f0.yaml")
    for i in range(1, 30):
        write(tmp_path, f"base: [f{i - 1}.yaml, f{i - 1}.yaml]\n", f"f{i}.yaml")
    assert message_of(tmp_path / "f29.yaml").endswith(
        f"more than {MAX_INCLUDES} files are included; keep the chain of base: files shorter"
    )


def test_override_wins_and_later_override_wins(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    resolved = load_config(
        path,
        ["optimizer.lr=1e-3", "train.compile=off", "optimizer.lr=2e-3", "data.split=[1, 0, 0]"],
    )
    assert resolved.config.optimizer.lr == 2e-3
    assert resolved.config.train.compile == "off"
    assert resolved.config.data.split == (1.0, 0.0, 0.0)
    assert str(resolved.origins["optimizer.lr"]) == "command line"


def test_override_of_a_section_merges(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["optimizer={beta1: 0.5, eps: 1e-6}"]).config
    assert (config.optimizer.lr, config.optimizer.beta1, config.optimizer.eps) == (3e-4, 0.5, 1e-6)


def test_override_below_an_absent_optional_section(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["model.rope_scaling.factor=4"]).config
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 4.0
    assert config.model.rope_scaling.original_max_seq_len == 8192


def test_only_the_first_equals_sign_separates(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["data.prefix=a=b", 'run.dir="x # y"']).config
    assert config.data.prefix == "a=b"
    assert config.run.dir == "x # y"


OVERRIDE_CASES = {
    "a.b": "command line: a.b: not section.key=value",
    "optimizer.lr": "command line: optimizer.lr: not section.key=value; write optimizer.lr=VALUE",
    "optimizer.lrr": "command line: optimizer.lrr: not section.key=value; did you mean optimizer.lr=VALUE?",
    "optimizer": (
        "command line: optimizer: not section.key=value; name a key of the section, for example "
        "optimizer.name=..."
    ),
    "": "command line: : not section.key=value",
    "=3": "command line: =3: not section.key=value",
    "optimizer.lerning_rate=3": "command line: "
    "optimizer.lerning_rate: unknown key; did you mean optimizer.lr?",
    "traiin.steps=3": "command line: traiin.steps: unknown key; did you mean train.steps?",
    "steps=3": "command line: steps: unknown key; did you mean train.steps?",
    "data.split.0=1": (
        "command line: data.split.0: unknown key; data.split is a single value; write data.split=..."
    ),
    "run.seed=": (
        "command line: run.seed=: no value; write run.seed=null to unset it or run.seed='\"\"' for empty text"
    ),
    "run.dir=#x": "command line: run.dir=#x: no readable value; put it in quotes",
    "run.dir=a #b": "command line: run.dir: '#b' after the value would be ignored; put the value in quotes",
    "run.seed=010": "command line: run.seed: 010 looks octal (8-based in YAML 1.1, decimal in YAML 1.2); "
    'write 10 for the number or "010" for text',
    "run.seed=[1": "command line: run.seed: YAML syntax error: expected ',' or ']', but got '<stream end>' "
    "(while parsing a flow sequence)",
    "run.seed=x": "command line: run.seed: expected a whole number >= 0; got 'x'",
    "run.name=!!python/name:os.system": "command line: run.name: tag !!python/name:os.system is refused: "
    "a config holds plain values only; nothing was executed",
    "base=other.yaml": (
        "command line: base: can only be set in a file; write a file with  base: ...  on its first line"
    ),
    "run.dir=\udcff": "command line: run.dir=\\udcff: no readable value; put it in quotes",
}


@pytest.mark.parametrize("text", OVERRIDE_CASES)
def test_bad_override(text: str, tmp_path: Path) -> None:
    assert message_of(write(tmp_path, MINIMAL), text) == OVERRIDE_CASES[text]
