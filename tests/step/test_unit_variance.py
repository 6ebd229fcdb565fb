"""Static recipes at step 0: every cast site near unit variance, next to nothing flushed, nothing
saturated."""

from __future__ import annotations

import fcntl
import math
import os

import pytest
import torch

from fp8train.precision.number_formats import E5M2
from fp8train.step.trainer import Trainer
from tests.training.tiny import alone, tiny_config

VOCAB, LENGTH = 512, 64
DEEP = [(layers, width) for layers in (4, 24, 100) for width in (64, 256, 1024)]


def cast_rows(
    recipe: str,
    family: str,
    layers: int,
    width: int,
    *overrides: str,
    level: str = "O1",
    zipf: bool = False,
) -> dict[str, dict[str, float]]:
    """Statistics of every cast of one step on random tokens, all as likely or as words are, by site."""
    config = tiny_config(
        [
            f"precision.recipe={recipe}",
            f"precision.level={level}",
            "precision.weights=compute",  # its statistics are taken where it is cast, in the forward
            f"model.family={family}",
            f"model.num_layers={layers}",
            f"model.hidden_size={width}",
            f"model.ffn_hidden_size={width * (4 if family == 'gpt' else 3)}",
            f"model.num_heads={width // 16}",
            f"model.num_kv_heads={width // 16}",
            f"model.vocab_size={VOCAB}",
            f"data.seq_length={LENGTH}",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            "logging.cast_statistics_interval=1",
            *overrides,
        ]
    )
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    assert trainer.monitors.recorder is not None
    trainer.monitors.recorder.active = True
    shape, generator = torch.Size((2, 2, config.data.seq_length + 1)), torch.Generator().manual_seed(7)
    if zipf:
        frequency = 1 / torch.arange(1, VOCAB + 1)
        tokens = torch.multinomial(frequency, shape.numel(), replacement=True, generator=generator).view(
            shape
        )
    else:
        tokens = torch.randint(VOCAB, shape, generator=generator)
    assert trainer.step(0, tokens).applied
    return {
        site: row for site, row in trainer.monitors.cast_rows().items() if not site.endswith("grad_weight")
    }


def check(recipe: str, family: str, layers: int, width: int, level: str = "O1") -> None:
    rows = cast_rows(recipe, family, layers, width, level=level)
    assert len(rows) == layers * 3 * (2 if recipe == "umup" else 4)
    for site, row in rows.items():
        # True gradients of a deep SwiGLU model grow towards the input; S puts their middle at 1.
        low, high = (2**-7, 2**7) if recipe == "mus" and site.endswith("grad_output") else (0.1, 10)
        assert low < row["rms"] < high, f"{site}: rms {row['rms']}"
        assert row["flushed"] < 0.01, f"{site}: {row['flushed']:.2%} flushed"
        assert row["saturated"] == 0, f"{site}: {row['saturated']:.2%} saturated"


@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("recipe", ["mus", "umup", "unit_scaling"])
def test_every_cast_site_is_near_unit_variance(recipe: str, family: str) -> None:
    check(recipe, family, 4, 64)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layers", "width"), DEEP[1:])
@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("recipe", ["mus", "umup", "unit_scaling"])
def test_every_depth_and_width(
    recipe: str, family: str, layers: int, width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    largest = (layers, width) == (100, 1024)  # 1.4 billion parameters
    needed = 22 if largest else 8
    if memory < needed:
        pytest.skip(f"needs {needed} GiB of memory, this machine has {memory:.0f}")
    if not largest:
        check(recipe, family, layers, width)
        return
    with (tmp_path_factory.getbasetemp().parent / "largest").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time, however many tests are: 17 GiB each
        check(recipe, family, layers, width, "O2")  # the same casts as at O1, in half the memory


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", 12),
        *(pytest.param("llama", n, marks=pytest.mark.slow) for n in (4, 24, 32, 48, 100)),
        *(pytest.param("gpt", n, marks=pytest.mark.slow) for n in (4, 24, 48)),
    ],
)
def test_gradients_of_long_sequences_of_words_fit(family: str, layers: int) -> None:
    """Tokens that come again make gradients larger, and some much larger, than random ones do."""
    rows = cast_rows("mus", family, layers, 64, "data.seq_length=1024", zipf=True)
    gradients = [row for site, row in rows.items() if site.endswith("grad_output")]
    room = math.log2(E5M2.max / max(row["amax"] for row in gradients))
    flushed = max(row["flushed"] for row in gradients)
    print(f"\n{family}, {layers} blocks: 2^{room:.1f} to spare above, at most {flushed:.2%} flushed")
    for site, row in rows.items():
        assert row["saturated"] == 0, f"{site}: {row['saturated']:.2%} saturated"
        assert row["flushed"] < 0.01, f"{site}: {row['flushed']:.2%} flushed"


def test_without_the_gradient_scale_most_gradients_would_be_flushed() -> None:
    """What S is for: a mean loss's gradients are below E5M2's range, and more so the wider the model."""
    rows = cast_rows("mus", "gpt", 2, 256, "parametrization.gradient_scale_exponent=0")
    flushed = [row["flushed"] for site, row in rows.items() if site.endswith("/grad_output")]
    assert min(flushed) > 0.1, flushed
    assert max(flushed) > 0.8, flushed
