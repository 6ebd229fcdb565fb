"""Generation: the cache changes nothing, seeds repeat, and a checkpoint becomes text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.save import save_checkpoint
from fp8train.cli import run_command
from fp8train.config.schema import Config, to_plain
from fp8train.data.errors import DataError
from fp8train.data.tokenizer_training import train_sentencepiece
from fp8train.inference.errors import InferenceError
from fp8train.inference.generate import generate, generate_command
from fp8train.inference.load import open_run
from fp8train.inference.sampling import Sampling, probabilities
from fp8train.models.build import build_model, initialise
from fp8train.models.decoder import Decoder
from tests.models.settings import FAMILIES, tiny_config, tiny_model

CPU = torch.device("cpu")
VOCAB = 300


def model_of(family: str) -> Decoder:
    return tiny_model(tiny_config({**FAMILIES[family], "init_std": 0.3}, precision={"compute": "fp64"}))


def without_cache(
    model: Decoder, prompt: list[int], number: int, sampling: Sampling, seed: int, count: int
) -> list[list[int]]:
    """The whole sequence through the model for every token, each row of the batch by itself."""
    generator = torch.Generator().manual_seed(seed)
    rows = [list(prompt) for _ in range(count)]
    for _ in range(number):
        with torch.no_grad():
            last = torch.cat([model.logits(torch.tensor([row]))[:, -1] for row in rows])
        chances = probabilities(last, sampling)
        if sampling.temperature == 0:
            drawn = chances.argmax(dim=-1)
        else:
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
        for row, token in zip(rows, drawn.tolist(), strict=True):
            row.append(token)
    return [row[len(prompt) :] for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.0), Sampling(1.3, top_k=20), Sampling(0.9, top_p=0.8)],
    ids=str,
)
def test_cache_gives_the_tokens_of_the_whole_sequence(family: str, sampling: Sampling) -> None:
    model, prompt = model_of(family), [7, 3, 55, 21]
    found = generate(
        model,
        prompt,
        max_tokens=21,  # up to the last position: the last token is never fed back
        sampling=sampling,
        generator=torch.Generator().manual_seed(8),
        eod_id=None,
        num_samples=3,
    )
    assert found == without_cache(model, prompt, 21, sampling, 8, 3)
    assert (len({tuple(row) for row in found}) == 1) == (sampling.temperature == 0)


def test_sampling_sees_the_logits_of_training() -> None:
    """Which the output multiplier of a static parametrisation scales; and a sample may be told to stop."""
    config = tiny_config({"family": "llama", "tie_embeddings": False}, precision={"compute": "fp64"})
    section = config.parametrization.model_copy(update={"kind": "mus"})
    config = config.model_copy(update={"parametrization": section})
    model = tiny_model(config)
    assert model.parametrization.head().output != 1.0
    sampling, prompt = Sampling(1.0), [7, 3, 55, 21]

    def sampled(**stop: Any) -> list[list[int]]:
        return generate(
            model,
            prompt,
            max_tokens=8,
            sampling=sampling,
            generator=torch.Generator().manual_seed(8),
            eod_id=None,
            num_samples=3,
            **stop,
        )

    expected = without_cache(model, prompt, 8, sampling, 8, 3)
    assert sampled() == expected
    assert sampled(stop=lambda tokens: len(tokens) == 3) == [row[:3] for row in expected]


def draw(model: Decoder, **changes: Any) -> list[list[int]]:
    arguments: dict[str, Any] = {
        "max_tokens": 15,
        "sampling": Sampling(
            changes.pop("temperature", 1.0), changes.pop("top_k", None), changes.pop("top_p", None)
        ),
        "generator": torch.Generator().manual_seed(changes.pop("seed", 8)),
        "eod_id": None,
    }
    return generate(model, changes.pop("prompt", [7, 3]), **{**arguments, **changes})


def test_seeds_repeat() -> None:
    model = model_of("llama")
    assert draw(model) == draw(model)
    assert draw(model) != draw(model, seed=9)


def test_a_sample_ends_at_the_end_of_document() -> None:
    model = model_of("llama")
    plain = draw(model, num_samples=4)
    eod = plain[0][5]
    ended = draw(model, num_samples=4, eod_id=eod)
    for whole, cut in zip(plain, ended, strict=True):
        # The others go on as if nothing had happened.
        assert cut == (whole[: whole.index(eod)] if eod in whole else whole)
    assert len(ended[0]) <= 5


def test_generation_stops_when_every_sample_has_ended() -> None:
    model = model_of("llama")
    eod = draw(model, temperature=0.0)[0][0]
    calls = []
    model.final_norm.register_forward_hook(lambda *_: calls.append(1))
    assert draw(model, temperature=0.0, eod_id=eod, num_samples=2) == [[], []]
    assert len(calls) == 1


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    model = model_of("llama")
    assert max(draw(model, num_samples=20, temperature=5.0)[0]) >= 10
    assert all(
        token < 10 for row in draw(model, num_samples=20, temperature=5.0, vocab_size=10) for token in row
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "the prompt has no tokens"),
        (
            {"prompt": [1] * 25, "max_tokens": 1},
            "the prompt has 25 tokens, the model's context .* is 24; shorten",
        ),
        (
            {"prompt": [1] * 10, "max_tokens": 16},
            "10 tokens of prompt and 16 new ones .* use --max-tokens 15 or",
        ),
    ],
)
def test_lengths_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        draw(model_of("llama"), **changes)


def test_a_diverged_model_is_refused() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(InferenceError, match="logits are not finite"):
        draw(model)


@pytest.fixture(scope="module")
def tokenizer_bytes() -> bytes:
    text = "".join(f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(200))
    return train_sentencepiece([text], vocab_size=VOCAB)


def write_run(
    run: Path, run_config: Config, tokenizer_file: bytes | None, **meta: Any
) -> dict[str, torch.Tensor]:
    """What training leaves: a run directory with one checkpoint of random weights. Returns the masters."""
    run.mkdir(parents=True)
    masters: dict[str, torch.Tensor] = {}
    here = run_config.kernels.model_copy(update={"attention": "auto"})
    built = build_model(run_config.model_copy(update={"kernels": here}), vocab_size=VOCAB, device=CPU)
    model = built.model
    wide = torch.float64 if run_config.precision.compute == "fp64" else torch.float32
    initialise(model, 1, lambda fqn, value: masters.__setitem__(fqn, value.to(wide)))
    if tokenizer_file is not None:
        (run / "tokenizer.model").write_bytes(tokenizer_file)
    description = {"config": to_plain(run_config), "vocab_size": VOCAB, "tokenizer": None}
    save_checkpoint(
        run / "checkpoints",
        30,
        {f"{kind}/{name}": value for name, value in masters.items() for kind in ("master", "exp_avg")},
        meta={k: v for k, v in (description | meta).items() if v != "absent"},
        rank_state={"rng": torch.arange(4)},
        group=None,
        keep_last=1,
    )
    return masters


def llama(**precision: Any) -> Config:
    model = {**FAMILIES["llama"], "init_std": 0.3, "max_seq_len": 48}
    train = {"compile": "block", "activation_checkpointing": "full"}
    # What training on a GPU asked for is nothing to whoever reads the run elsewhere.
    kernels = {"attention": "auto" if "compute" in precision else "flash2"}
    return tiny_config(model, precision={"compute": "bf16", **precision}, train=train, kernels=kernels)


@pytest.mark.parametrize("compute", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("fp8", [False, True])
def test_weights_are_the_rounded_masters(
    tmp_path: Path, tokenizer_bytes: bytes, compute: str, fp8: bool
) -> None:
    """Those in FP8 to half a unit in the last place; tests/inference/test_numerics.py compares codes."""
    masters = write_run(tmp_path / "run", llama(compute=compute, gemm={"fp8": fp8}), tokenizer_bytes)
    run = open_run(tmp_path / "run")
    model = run.load("matched", device=CPU).model
    assert run.step == 30
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[compute]
    linears = {f"{path}.weight": linear for path, linear in model.linears().items()}
    for name, parameter in model.named_parameters():
        if fp8 and name in linears:
            values, unit = linears[name].dequantized_weight(torch.float64), masters[name].abs().max() / 256
            error = (values - masters[name]).abs()
            assert bool((error <= torch.maximum(masters[name].abs() * 2**-4, unit * 2**-7)).all())
            assert error.max() > 0
        else:
            assert torch.equal(parameter, masters[name].to(dtype))
    in_fp8 = [linear.plan is not None for linear in linears.values()]
    assert in_fp8 == [fp8] * 8


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000030"])
def test_command(
    tmp_path: Path, tokenizer_bytes: bytes, capsys: pytest.CaptureFixture[str], fp8: bool, place: str
) -> None:
    """From the run directory, its checkpoints or the checkpoint itself, through the command line."""
    config = llama(gemm={"fp8": fp8})
    write_run(tmp_path / "run", config, tokenizer_bytes)
    options = [
        "--prompt",
        "def f",
        "--max-tokens",
        "12",
        "--top-k",
        "40",
        "--top-p",
        "0.9",
        "--device",
        "cpu",
    ]
    arguments = ["generate", str(tmp_path / "run" / place), *options, "--num-samples", "2", "--seed", "3"]
    assert run_command(arguments) == 0
    out, err = capsys.readouterr()
    assert "step 30, " + ("FP8: 8 of 9 linears; skipped 1 (head: 1)" if fp8 else "bf16") in err

    run = open_run(tmp_path / "run")
    model, tokenizer = run.load("matched", device=CPU).model, run.tokenizer()
    prompt = tokenizer.encode("def f")
    expected = generate(
        model,
        prompt,
        max_tokens=12,
        sampling=Sampling(1.0, top_k=40, top_p=0.9),
        generator=torch.Generator().manual_seed(3),
        eod_id=tokenizer.eod_id,
        num_samples=2,
    )
    texts = [tokenizer.decode([*prompt, *row]) for row in expected]
    assert all(text.startswith("def f") for text in texts)
    assert out == "".join(f"--- sample {i} of 2\n{text}\n" for i, text in enumerate(texts, start=1))


def run_with(path: Path, **changes: Any) -> int:
    arguments: dict[str, Any] = {
        "prompt": "def",
        "max_tokens": 5,
        "sampling": Sampling(temperature=0.0),
        "seed": 1,
        "num_samples": 1,
        "device": "cpu",
        "numerics": "matched",
    }
    return generate_command(path, **(arguments | changes))


def test_an_empty_prompt_begins_a_document(
    tmp_path: Path, tokenizer_bytes: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", llama(), tokenizer_bytes)
    run_with(tmp_path / "run", prompt="")
    run = open_run(tmp_path / "run")
    model, tokenizer = run.load("matched", device=CPU).model, run.tokenizer()
    eod = tokenizer.eod_id
    [tokens] = draw(model, prompt=[eod], max_tokens=5, temperature=0.0, eod_id=eod)
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"


def test_tokenizer_of_the_dataset_serves_when_the_run_has_none(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    recorded = tmp_path / "data.model"
    recorded.write_bytes(tokenizer_bytes)
    write_run(tmp_path / "run", llama(), None, tokenizer=str(recorded))
    assert open_run(tmp_path / "run").tokenizer().path == recorded
    (tmp_path / "run" / "tokenizer.model").write_bytes(tokenizer_bytes)
    assert open_run(tmp_path / "run").tokenizer().path == tmp_path / "run" / "tokenizer.model"


def test_missing_things(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    with pytest.raises(InferenceError, match="nothing: no such directory"):
        run_with(tmp_path / "nothing")
    with pytest.raises(InferenceError, match="holds no checkpoint; give a run directory"):
        run_with(tmp_path)
    write_run(tmp_path / "lost", llama(), None, tokenizer=str(tmp_path / "gone.model"))
    with pytest.raises(
        InferenceError, match=r"tokenizer is not at .*gone\.model; copy it to .*lost/tokenizer\.model"
    ):
        run_with(tmp_path / "lost")
    write_run(tmp_path / "bare", llama(), tokenizer_bytes, config="absent")
    with pytest.raises(InferenceError, match="not a checkpoint of a training run: no config in it"):
        run_with(tmp_path / "bare")
    plain = to_plain(llama())
    plain["model"]["colour"] = "blue"
    write_run(tmp_path / "other", llama(), tokenizer_bytes, config=plain)
    with pytest.raises(InferenceError, match=r"does not fit this version of fp8train: model\.colour"):
        run_with(tmp_path / "other")


def test_wrong_things(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    write_run(tmp_path / "small", llama(), tokenizer_bytes, vocab_size=VOCAB - 1)
    with pytest.raises(InferenceError, match=f"has {VOCAB} tokens, but the model in .* knows {VOCAB - 1}"):
        run_with(tmp_path / "small")
    write_run(tmp_path / "garbled", llama(), b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        run_with(tmp_path / "garbled")
    write_run(tmp_path / "run", llama(), tokenizer_bytes)
    with pytest.raises(InferenceError, match="use --max-tokens"):
        run_with(tmp_path / "run", prompt="def f(x, y):\n" * 3, max_tokens=40)
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    shard = next((tmp_path / "broken" / "checkpoints").glob("step_*/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        run_with(tmp_path / "broken")


def test_user_errors_have_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", str(tmp_path / "nothing")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'nothing'}: no such directory; give a run directory, ")
    assert err.count("\n") == 1
