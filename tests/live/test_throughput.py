"""FLOPs against hand counts and torch's own counter, the clock, and the table of peaks."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fp8train.config.resolve import resolve_mapping
from fp8train.live.throughput import Throughput, flops_per_token, matmul_parameters, memory_bytes, peak_of
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, tiny_config

LLAMA2_7B = {
    "family": "llama",
    "num_layers": 32,
    "hidden_size": 4096,
    "num_heads": 32,
    "ffn_hidden_size": 11008,
    "vocab_size": 32000,
}


def model_of(**model):
    mapping = {
        "model": model,
        "data": {"prefix": "unused", "seq_length": 4096},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    return resolve_mapping(mapping, ()).config.model


def test_llama2_7b() -> None:
    model = model_of(**LLAMA2_7B)
    # 6,738,415,616 parameters in all, less the input embedding and 65 RMSNorms
    assert matmul_parameters(model, 32000) == 6_738_415_616 - 32000 * 4096 - 65 * 4096
    # attention, forward and backward, half of 12 L h s
    assert flops_per_token(model, 4096, vocab_size=32000) == 6 * 6_607_077_376 + 6 * 32 * 4096 * 4096


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_against_torchs_counter(family: str) -> None:
    seq, samples = 16, 2
    config = tiny_config([f"model.family={family}", "precision.compute=fp32"])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    tokens = torch.randint(VOCAB, (1, samples, seq + 1), generator=torch.Generator().manual_seed(0))
    # The counter cannot see into our operator that multiplies for the weight's gradient.
    opaque = {
        torch.ops.fp8train.contribute_grad_weight: lambda g, x, *_, **__: 2 * g[0] * g[1] * x[1],
        torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],  # of the head; it knows addmm
    }
    with FlopCounterMode(display=False, custom_mapping=opaque) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.step(0, tokens)
    model = trainer.model.config
    width = model.num_heads * model.head_dim
    # torch counts whole score matrices and the padded vocabulary; we count half, and the real vocabulary.
    padded = -(-VOCAB // model.vocab_multiple) * model.vocab_multiple
    expected = flops_per_token(model, seq, vocab_size=padded) + 6 * model.num_layers * width * seq
    assert counter.get_total_flops() == expected * samples * seq


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_windows_leave_out_evaluation_and_saving() -> None:
    clock, model = Clock(), model_of(**LLAMA2_7B)
    throughput = Throughput(
        model, 4096, torch.device("cpu"), vocab_size=32000, world_size=4, fp8=False, clock=clock
    )
    assert math.isnan(throughput.eta_s(10))
    clock.now = 30.0
    throughput.restart()  # set-up does not count
    clock.now += 20.0
    with throughput.excluded():
        clock.now += 5.0
    metrics = throughput.measure(steps=10, tokens=80_000)
    flops = flops_per_token(model, 4096, vocab_size=32000)
    assert metrics == {
        "throughput/tokens_per_second": 4000.0,
        "throughput/tokens_per_second_per_device": 1000.0,
        "throughput/tflops_per_device": pytest.approx(1000 * flops / 1e12),
        "time/step_seconds": 2.0,
    }  # no MFU: a CPU has no peak here
    assert throughput.eta_s(100) == pytest.approx(100 * (2.0 + 0.5))
    clock.now += 10.0
    assert throughput.measure(steps=10, tokens=80_000)["time/step_seconds"] == 1.0
    clock.now += 10.0
    throughput.measure(steps=10, tokens=80_000)
    assert throughput.eta_s(30) == pytest.approx(30 * (1.0 + 5.0 / 30))


def test_a_look_at_a_window_does_not_end_it() -> None:
    clock = Clock()
    throughput = Throughput(
        model_of(**LLAMA2_7B),
        4096,
        torch.device("cpu"),
        vocab_size=32000,
        world_size=4,
        fp8=False,
        clock=clock,
    )
    clock.now += 60.0
    throughput.measure(steps=1, tokens=1000)  # the first step, which compiles
    clock.now += 6.0
    with throughput.excluded():
        clock.now += 100.0
    for _ in range(2):
        assert throughput.so_far(3, 3000, steps_left=10) == (500.0, 20.0)
    clock.now += 2.0
    assert throughput.measure(steps=4, tokens=4000)["time/step_seconds"] == 2.0
    clock.now += 1.0
    rate, eta_s = throughput.so_far(1, 1000, steps_left=10)  # windows of 2 s and 1 s a step, 100 s aside
    assert (rate, eta_s) == (1000.0, pytest.approx(10 * (2.0 + 100.0 / 5)))


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA H100 NVL", 835, 1671),
        ("NVIDIA H200", 989, 1979),
        ("NVIDIA GH200 480GB", 989, 1979),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA L40S", 362, 733),
        ("NVIDIA L4", 121, 242),
        ("NVIDIA H20", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peaks_are_named_and_unknown_devices_have_none(
    name: str, bf16: float | None, fp8: float | None
) -> None:
    for kind, rate in (("BF16", bf16), ("FP8", fp8)):
        peak = peak_of(name, fp8=kind == "FP8")
        if rate is None:
            assert peak is None
        else:
            assert peak is not None
            assert peak.flops == rate * 1e12
            assert peak.name.startswith(f"{rate} TFLOP/s (")
            assert peak.name.endswith(f", {kind})")


def test_memory_grows_with_what_is_held() -> None:
    before = memory_bytes(torch.device("cpu"))["memory/peak_bytes"]
    held = torch.ones(int(before // 4) + 16 * 2**20)
    after = memory_bytes(torch.device("cpu"))["memory/peak_bytes"]
    assert after >= held.numel() * 4
    assert after > before
