"""What only a CUDA device can show. Run with: launch/test.sh -m gpu"""

from __future__ import annotations

import pytest
import torch

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.kernels.deterministic import use_deterministic_kernels
from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.numerics.cast import quantize
from fp8train.optim.copy_queues import copy_queues
from fp8train.optim.host_states import Offload
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from fp8train.step.targets import inputs_and_targets
from fp8train.step.trainer import Trainer
from tests.kernels.gpu.same import same
from tests.training.tiny import VOCAB, batches, tiny_config

pytestmark = pytest.mark.gpu


def on_cuda() -> Processes:
    return Processes(torch.device("cuda", 0), 1, 0, CountedGroup(None), None)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_give_the_same_codes_as_on_the_cpu(fmt: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(512, 256) * torch.exp(3 * torch.randn(512, 256))).to(dtype)
    for spec in (QuantSpec(fmt), QuantSpec(fmt, power_of_two=False), QuantSpec(fmt, margin=1)):
        here, there = quantize(x, spec), quantize(x.cuda(), spec)
        assert torch.equal(here[1], there[1].cpu())
        assert torch.equal(here[0].view(torch.uint8), there[0].cpu().view(torch.uint8))


@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_tensor_cores_agree_with_decoded_operands(
    formats: tuple[Format, Format], out_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    a, scale_a = quantize(torch.randn(96, 512, device="cuda"), QuantSpec(formats[0]))
    b, scale_b = quantize(torch.randn(512, 64, device="cuda"), QuantSpec(formats[1]))
    exact = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    bound = (a.double().abs() @ b.double().abs()) * scale_a.double() * scale_b.double()
    got = fp8_gemm(a, b, scale_a, scale_b, power_of_two=True, out_dtype=out_dtype, backend="scaled_mm")
    # products are exact; Hopper adds with about 14 bits; one rounding to the result's dtype
    rounding = 2.0**-8 if out_dtype == torch.bfloat16 else 2.0**-23
    assert ((got.double() - exact).abs() <= bound * 2.0**-12 + exact.abs() * rounding).all()


@pytest.mark.parametrize("fp8", ["true", "false"])
@pytest.mark.parametrize("compile_mode", ["off", "block"])
def test_training_follows_the_cpu(fp8: str, compile_mode: str) -> None:
    overrides = [f"precision.gemm.fp8={fp8}", f"train.compile={compile_mode}", "model.hidden_size=64"]
    config = tiny_config([*overrides, "model.ffn_hidden_size=128"])
    cpu = Processes(torch.device("cpu"), 1, 0, CountedGroup(None), None)
    curves = []
    for processes in (cpu, on_cuda()):
        trainer = Trainer(config, processes, vocab_size=VOCAB)
        if fp8 == "true" and processes.device.type == "cuda":
            assert trainer.built.fp8.backend == choose_gemm_backend(processes.device, torch.bfloat16)
            assert trainer.built.fp8.backend.name == "scaled_mm"
        data = batches(config, processes)
        curves.append([float(trainer.step(i, data.batch(i)).loss) for i in range(10)])
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_released_gradients_give_the_same_bits(level: str) -> None:
    settings = [f"precision.level={level}", "run.deterministic=true", "optimizer.clip_grad_norm=0"]
    settings += ["train.micro_batch_size=8", "precision.gradient.bucket_mib=0.02", "model.num_layers=4"]
    settings += ["model.hidden_size=128", "model.ffn_hidden_size=256"]

    def run(release: str) -> tuple[list[float], bytes]:
        config = tiny_config([*settings, f"train.gradient_release={release}"])
        trainer, data = Trainer(config, on_cuda(), vocab_size=VOCAB), batches(config, on_cuda())
        losses = [float(trainer.step(i, data.batch(i)).loss) for i in range(5)]
        return losses, b"".join(
            t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in trainer.state_tensors().values()
        )

    try:
        assert run("true") == run("false")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("release", ["false", "true"])
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_states_in_host_memory_give_the_same_bits(level: str, release: str) -> None:
    """With slots so small that all of them are in use at once."""
    settings = [f"precision.level={level}", "run.deterministic=true", "optimizer.clip_grad_norm=0"]
    settings += ["train.micro_batch_size=8", "model.num_layers=4", f"train.gradient_release={release}"]
    settings += ["model.hidden_size=128", "model.ffn_hidden_size=256"]

    def run(place: str) -> tuple[list[float], bytes]:
        config = tiny_config([*settings, f"optimizer.offload={place}"])
        offload = Offload(copy_queues(on_cuda().device), slot_bytes=1 << 16)
        trainer = Trainer(config, on_cuda(), vocab_size=VOCAB, offload=offload)
        data = batches(config, on_cuda())
        losses = [float(trainer.step(i, data.batch(i)).loss) for i in range(5)]
        states = trainer.optimizer.states.tensors().values()
        assert place == "none" or all(t.is_pinned() for t in states), "host memory is not page-locked"
        return losses, b"".join(t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in states)

    try:
        assert run("cpu") == run("none")
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_runs_are_bit_identical() -> None:
    def weights() -> bytes:
        config = tiny_config(["precision.gemm.fp8=true", "run.deterministic=true"])
        trainer = Trainer(config, on_cuda(), vocab_size=VOCAB)
        data = batches(config, on_cuda())
        for i in range(5):
            trainer.step(i, data.batch(i))
        return b"".join(t.cpu().numpy().tobytes() for t in trainer.state_tensors().values())

    try:
        assert weights() == weights()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("level", "accumulation"), [("O0", 1), ("O1", 1), ("O2", 3), ("O3", 3)])
def test_cuda_graphs_give_the_bits_of_eager_steps(level: str, accumulation: int) -> None:
    """Steps before the recording and behind it, an evaluation and sampled steps among them."""

    def trained(graphs: str) -> tuple[list[float], dict[str, torch.Tensor], int]:
        settings = [f"precision.level={level}", f"run.cuda_graphs={graphs}", "run.deterministic=true"]
        settings += ["logging.cast_statistics_interval=5", f"train.global_batch_size={accumulation}"]
        config = tiny_config([*settings, "model.hidden_size=64", "model.ffn_hidden_size=128"])
        trainer = Trainer(config, on_cuda(), vocab_size=VOCAB)
        data, recorder, losses = batches(config, on_cuda()), trainer.monitors.recorder, []
        for i in range(12):
            if recorder is not None:
                recorder.active = i in (5, 6, 7)
            losses.append(float(trainer.step(i, data.batch(i)).loss))
            if recorder is not None:
                recorder.active = False
            if i in (1, 9):
                tokens = (part.cuda() for part in inputs_and_targets(data.batch(99), None))
                losses.append(float(trainer.summed_loss(*tokens)))
        replays = 0 if trainer.recorded is None else trainer.recorded.replays
        return losses, {name: tensor.cpu() for name, tensor in trainer.state_tensors().items()}, replays

    use_deterministic_kernels()
    try:
        (eager, states, none), (losses, recorded, replays) = trained("false"), trained("true")
    finally:
        torch.use_deterministic_algorithms(False)
    assert none == 0
    assert replays == 10 - 2 * (level != "O0")  # the first two steps of a kind are eager
    assert losses == eager
    for name, tensor in states.items():
        assert same(tensor, recorded[name]), name
