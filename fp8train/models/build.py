"""Makes the model of a configuration on a device, with its FP8 plan, and fills in its initial values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.config.model_schema import ModelConfig
from fp8train.config.schema import Config
from fp8train.kernels.deterministic import use_deterministic_kernels
from fp8train.kernels.gemm import GemmBackend, choose_gemm_backend
from fp8train.models.decoder import Decoder
from fp8train.models.fp8_plan import PlanReport, plan_fp8
from fp8train.models.mus import MuS
from fp8train.models.param_spec import initial_value
from fp8train.models.parametrization import Batch, Parametrization
from fp8train.models.part import ModelPart
from fp8train.models.unit_scaling import UnitMaximalUpdate, UnitScaling
from fp8train.precision.precision import Smoothing

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class BuiltModel:
    """A model and how its GEMMs are to run; :mod:`fp8train.models.connect` makes them.

    Attributes:
        model: on its device, parameters uninitialised; perhaps a part of the model.
        fp8: what is in FP8, of the whole model; None if nothing was asked to be.
        backend: the FP8 GEMM in use; None without FP8.
    """

    model: Decoder
    fp8: PlanReport | None
    backend: GemmBackend | None


def with_vocab_size(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """The model's settings with the tokenizer's vocabulary where none was set."""
    return model if model.vocab_size is not None else model.model_copy(update={"vocab_size": vocab_size})


_PARAMETRIZATIONS = {
    "standard": Parametrization,
    "mus": MuS,
    "unit_scaling": UnitScaling,
    "umup": UnitMaximalUpdate,
}


def parametrization(config: Config, vocab_size: int) -> Parametrization:
    """The parametrisation of a run; ``vocab_size`` as for :func:`build_model`."""
    length = config.data.seq_length
    batch = Batch(config.train.global_batch_size * length, config.parametrization.attention_length or length)
    model = with_vocab_size(config.model, vocab_size)
    return _PARAMETRIZATIONS[config.parametrization.kind](model, config.parametrization, batch)


def build_model(
    config: Config,
    *,
    vocab_size: int,
    device: torch.device,
    part: ModelPart | None = None,
    parallel: TensorParallel | None = None,
    context: ContextParallel | None = None,
    forward_only: bool = False,
) -> BuiltModel:
    """Construct the decoder, or a part of it. The FP8 plan is made for the whole model either way, and
    awaits :func:`fp8train.models.connect.connect_linears`. ``run.deterministic`` holds from here on, for the
    whole process.

    Args:
        config: a validated configuration.
        vocab_size: the tokenizer's, used where ``model.vocab_size`` is not set.
        device: where parameters live.
        part: what to hold of the model; by default everything.
        parallel: ranks among which matrices are cut.
        context: ranks with the other tokens of each sequence.
        forward_only: FP8 weights come from a checkpoint and nothing trains them.

    Raises:
        ValueError: the device cannot multiply in FP8.
    """
    if config.run.deterministic:
        use_deterministic_kernels()
    dtype = COMPUTE_DTYPES[config.precision.compute]
    model = Decoder(
        parametrization(config, vocab_size),
        decay_rule=config.optimizer.decay_rule,
        dtype=dtype,
        device=device,
        activation_checkpointing=config.train.activation_checkpointing,
        fp8_saved=config.precision.activations == "fp8",
        part=part,
        parallel=parallel,
        context=context,
    )
    in_parts = part is not None or model.parallel is not None
    report = backend = None
    if (quant := config.precision.gemm.value()) is not None:
        backend = choose_gemm_backend(device, dtype, quant)
        report = plan_fp8(
            (outline(config, vocab_size) if in_parts else model).linears(),
            config.precision,
            backend,
            num_layers=config.model.num_layers,
            held=model.linears(),
            forward_only=forward_only,
        )
        if config.precision.gemm.smooth_swiglu != "off":
            _smooth_swiglu(model, report, config.precision.gemm.smooth_swiglu)
        in_plan = {f"{path}.weight" for path in report.converted}
        model.specs = {fqn: spec.with_fp8(fqn in in_plan) for fqn, spec in model.specs.items()}
    if config.train.compile == "block":
        for block in model.held_blocks():
            block.compile(fullgraph=True)
    return BuiltModel(model, report, backend)


def _smooth_swiglu(model: Decoder, report: PlanReport, smooth: Smoothing) -> None:
    for block in model.held_blocks():
        if block.mlp.down.name in report.plans:
            block.mlp.use_smooth_swiglu(smooth)


def outline(config: Config, vocab_size: int) -> Decoder:
    """The whole model without storage (on the meta device): names and shapes, whatever part a process
    holds."""
    dtype = COMPUTE_DTYPES[config.precision.compute]
    return Decoder(
        parametrization(config, vocab_size),
        decay_rule=config.optimizer.decay_rule,
        dtype=dtype,
        device=torch.device("meta"),
    )


@torch.no_grad()
def initialise(model: Decoder, seed: int, seed_master: Callable[[str, Tensor], None] | None = None) -> None:
    """Fill the parameters with their values at step 0.

    Args:
        model: where to write, its linears connected; values are rounded to its compute dtype. Weights that
            exist in FP8 only are left to the optimizer.
        seed: ``run.seed``.
        seed_master: receives each (fqn, FP32 logical value) before rounding, so that master weights start
            from the true values.
    """
    resident = {f"{path}.weight" for path, linear in model.linears().items() if linear.fp8_weight_is_resident}
    for fqn, parameter in model.named_parameters():
        spec = model.specs[fqn]
        value = initial_value(spec, seed)
        if fqn not in resident:
            parameter.copy_(spec.local(value))
        if seed_master is not None:
            seed_master(fqn, value)
