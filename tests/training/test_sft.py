"""Fine-tuning: loss and gradients of answers alone, at every level and in every layout, resumed exactly."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fp8train.cli import run_command
from fp8train.cli.train_command import train_command
from fp8train.comm.processes import Layout, Processes, joined_processes
from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import Config
from fp8train.data.loading import Data, open_data
from fp8train.data.prepare_sft import prepare_sft
from fp8train.data.tokenizer_training import train_sentencepiece
from fp8train.models.build import build_model, initialise
from fp8train.run_dir.metrics import read_metrics
from fp8train.step.targets import inputs_and_targets
from fp8train.step.trainer import Trainer
from tests.parallel.gradients.reading import gradient_of
from tests.training.tiny import alone

pytestmark = pytest.mark.usefixtures("one_thread")

_TEXT = "fold the paper twice and glue its wet edge before it dries under warm light"
WORDS = _TEXT.split()
LEVELS = ("O0", "O1", "O2")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions whose answer is their last word, said twice."""
    folder = tmp_path_factory.mktemp("sft")
    draw = random.Random(4)
    (folder / "t.model").write_bytes(train_sentencepiece([_TEXT] * 50, vocab_size=300, model_type="bpe"))
    lines = []
    for _ in range(120):
        words = draw.choices(WORDS, k=draw.randrange(2, 5))
        lines.append({"prompt": " ".join(words) + ":", "response": f" {words[-1]} {words[-1]}"})
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_sft([folder / "c.jsonl"], folder / "c", tokenizer=folder / "t.model")
    return str(folder / "c")


def settings(prefix: str) -> dict[str, Any]:
    """A run of a tiny model."""
    return {
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 2,
                  "ffn_hidden_size": 256},
        "data": {"kind": "sft", "prefix": prefix, "seq_length": 64, "split": [0.8, 0.2, 0]},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "eval_interval": 8,
                  "eval_batches": 2},
        "checkpoint": {"interval": 4},
        "logging": {"interval": 1, "tensorboard": False, "cast_statistics_interval": 0},
        "run": {"threads": 1, "device": "cpu"},
    }  # fmt: skip


def config_of(prefix: str, *overrides: str) -> Config:
    return resolve_mapping(settings(prefix), overrides).config


def opened(config: Config, processes: Processes) -> Data:
    return open_data(
        config.data,
        vocab_size=None,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=processes.dp.rank,
        dp_size=processes.dp.size,
        seed=config.run.seed,
        total_steps=config.total_steps,
    )


def cross_entropy(logits: Tensor, batch: Tensor) -> Tensor:
    """Mean over answers alone, in FP64, from a batch whose other tokens are complemented."""
    ids = torch.where(batch < 0, -1 - batch, batch)
    learnt = batch[:, 1:] >= 0
    return F.cross_entropy(logits.double()[learnt], ids[:, 1:][learnt])


def test_loss_and_gradients_are_those_of_the_answers(prefix: str) -> None:
    config = config_of(prefix, "precision.compute=fp64")
    data = opened(config, alone())
    batch = data.train.batch(0)
    trainer = Trainer(config, alone(), vocab_size=data.vocab_size)
    model = build_model(config, vocab_size=data.vocab_size, device=torch.device("cpu")).model
    initialise(model, config.run.seed)  # a copy, run by autograd alone
    flat = batch.flatten(0, 1)
    assert 0.1 < float((flat >= 0).double().mean()) < 0.9
    expected = cross_entropy(model.logits(torch.where(flat < 0, ~flat, flat)[:, :-1]), flat)
    expected.backward()
    expected = expected.detach()

    inputs, targets = inputs_and_targets(batch, None)
    count = trainer._global_token_count(targets)
    assert int(count) == int((flat[:, 1:] >= 0).sum())
    total = trainer._accumulate(inputs, targets, count)
    assert float(total.detach() / count) == pytest.approx(float(expected), rel=1e-12)
    for fqn, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            gradient_of(trainer.store, fqn).view_as(parameter), parameter.grad, rtol=1e-9, atol=1e-12
        )
    everything = inputs_and_targets(torch.where(batch < 0, ~batch, batch), None)[1]
    assert float(trainer.summed_loss(inputs, everything)) / everything.numel() != pytest.approx(
        float(expected), rel=1e-3
    ), "prompts must matter, else this proves nothing"


def test_prompts_have_no_gradient_of_their_own(prefix: str) -> None:
    """At the head: the gradient of a state that predicts no answer is exactly zero."""
    config = config_of(prefix, "precision.compute=fp64")
    data = opened(config, alone())
    model = build_model(config, vocab_size=data.vocab_size, device=torch.device("cpu")).model
    initialise(model, 1)
    inputs, targets = (part[0] for part in inputs_and_targets(data.train.batch(0), None))
    hidden = model.hidden(inputs).detach().requires_grad_()
    model.loss(hidden, targets).backward()
    assert hidden.grad is not None
    is_zero = (hidden.grad == 0).all(dim=-1)
    assert torch.equal(is_zero, data.train.batch(0)[0][:, 1:] < 0)


def losses(config: Config, processes: Processes, steps: int = 4) -> list[float]:
    data = opened(config, processes)
    trainer = Trainer(config, processes, vocab_size=data.vocab_size)
    return [float(trainer.step(i, data.train.batch(i)).loss) for i in range(steps)]


LAYOUTS = {
    "dp": Layout(),
    "tp": Layout(tp=2),
    "pp": Layout(pp=2),
    "cp": Layout(cp=2),
}


def losses_in_layouts(
    group: dist.ProcessGroup, rank: int, world_size: int, prefix: str
) -> dict[str, list[float]]:
    """Runs in the pool: the same steps in every layout in FP64, and O3 with ZeRO."""
    found = {}
    for name, layout in LAYOUTS.items():
        overrides = ["precision.compute=fp64"] + ([] if name == "dp" else [f"parallel.{name}=2"])
        if name == "pp":
            overrides.append("train.micro_batch_size=1")
        found[name] = losses(config_of(prefix, *overrides), joined_processes(torch.device("cpu"), layout))
    found["O3"] = losses(config_of(prefix, "precision.level=O3"), joined_processes(torch.device("cpu")), 8)
    return found


def test_every_layout_and_level(gloo_pool, prefix: str) -> None:
    """Ranks hold different numbers of targets, so a mean of means would differ."""
    expected = losses(config_of(prefix, "precision.compute=fp64"), alone(), 8)
    assert expected[-1] < 0.8 * expected[0]
    found = gloo_pool.run(losses_in_layouts, 2, prefix, timeout=120.0)[0]
    for name in LAYOUTS:
        assert found[name] == pytest.approx(expected[:4], rel=1e-9), name
    levels = {level: losses(config_of(prefix, f"precision.level={level}"), alone(), 8) for level in LEVELS}
    for name, curve in {**levels, "O3": found["O3"]}.items():
        assert curve == pytest.approx(expected, rel=0.03), name


def test_resume_and_validation(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Continued from step 4, the run's losses and validation are those of the unbroken one, to the bit; and
    ``fp8train eval`` gives that validation, over answers alone."""
    import yaml

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(prefix)))
    always = (f"run.dir={tmp_path}", "precision.level=O2")
    with ExitStack() as lifetime:
        assert train_command(file, [*always, "run.name=whole"], lifetime) == 0
    resume = f"checkpoint.resume={tmp_path}/whole/checkpoints/step_00000004"
    with ExitStack() as lifetime:
        assert train_command(file, [*always, "run.name=rest", resume], lifetime) == 0
    keys = ("step", "train/loss", "optim/grad_norm", "eval/loss")

    def rows(name: str) -> list[tuple[Any, ...]]:
        found = read_metrics(tmp_path / name / "metrics.jsonl")
        return [tuple(row.get(key) for key in keys) for row in found if row["step"] > 4]

    assert rows("rest") == rows("whole") and len(rows("rest")) >= 4
    report = tmp_path / "report.json"
    options = ["--device", "cpu", "--numerics", "matched", "--json", str(report)]
    assert run_command(["eval", str(tmp_path / "whole"), *options]) == 0
    [result] = json.loads(report.read_text())["results"]
    [logged] = [row[3] for row in rows("whole") if row[3] is not None]
    assert result["loss"] == logged
    valid = opened(config_of(prefix), alone()).valid
    assert valid is not None
    count = min(2, valid.batches_per_epoch)
    assert result["tokens"] == sum(int((valid.batch(i)[..., 1:] >= 0).sum()) for i in range(count))
    assert result["bits_per_byte"] is not None
    options = ["--device", "cpu", "--numerics", "bf16", "--json", str(report)]
    assert run_command(["eval", str(tmp_path / "whole"), "--batch-size", "1", *options]) == 0
    assert json.loads(report.read_text())["results"][0]["tokens"] == result["tokens"]
    assert "sequences filled" in capsys.readouterr().out
