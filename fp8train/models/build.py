"""Makes the model of a configuration on a device, with its FP8 plan, and fills in its initial values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.config.kernel_schema import GemmKernel
from fp8train.config.linear_names import weights_in_fp8
from fp8train.config.model_schema import ModelConfig
from fp8train.config.schema import Config
from fp8train.kernels.attention import AttentionBackend, AttentionCall, activate, choose_attention_backend
from fp8train.kernels.deterministic import use_deterministic_kernels
from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.kernels.norm_backend import AUTO, NormBackend, choose_norm_backend
from fp8train.kernels.package_kernels import RunsOn, on_cuda
from fp8train.kernels.te.native import autocast, make_recipe
from fp8train.kernels.te.quantize import TeCaster
from fp8train.layers.fp8_head import Fp8Head
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.layers.wire import wire
from fp8train.models.decoder import Decoder
from fp8train.models.fp8_plan import PlanReport, plan_fp8
from fp8train.models.mus import MuS
from fp8train.models.param_spec import initial_values
from fp8train.models.parametrization import Batch, Parametrization
from fp8train.models.part import ModelPart
from fp8train.models.unit_scaling import UnitMaximalUpdate, UnitScaling
from fp8train.precision.transformer_engine import native_recipe

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class BuiltModel:
    """A model and how its GEMMs are to run; :mod:`fp8train.models.connect` makes them.

    Attributes:
        model: on its device, parameters uninitialised; perhaps a part of the model.
        fp8: what is in FP8, of the whole model; None if nothing was asked to be.
        attention: what computes attention.
        norm: what computes norms.
        compiles: whether blocks that are not fused functions are to be compiled, once they are connected.
    """

    model: Decoder
    fp8: PlanReport | None
    attention: AttentionBackend
    norm: NormBackend = AUTO
    compiles: bool = False


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
    partitioned: bool = False,
    runs_on: RunsOn = on_cuda,
) -> BuiltModel:
    """Construct the decoder, or a part of it. The FP8 plan is that of the whole model either way, and
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
        partitioned: parameters have values only while the modules that own or borrow them run
            (:meth:`~fp8train.models.decoder.Decoder.borrowed_weights`), as under ZeRO-3: nothing is kept that
            is made of them, and nothing but their modules reads them.
        runs_on: where the kernels of other packages run.

    Raises:
        ValueError: the device cannot multiply in FP8, or has no attention or norms of the kind that is asked
            for.
        RuntimeError: a package whose kernels are asked for does not load.
    """
    if config.run.deterministic:
        use_deterministic_kernels()
    model = _decoder(config, vocab_size, device, part, parallel, context)
    gemm, report = config.precision.gemm, None
    if (quant := gemm.value()) is not None:
        backend = choose_gemm_backend(device, model.dtype, quant, config.kernels.gemm)
        caster = TeCaster() if config.kernels.quantize == "te" else None
        report = plan_fp8(config, backend, caster=caster, forward_only=forward_only, partitioned=partitioned)
        if report.native:
            recipe = native_recipe(quant)
            assert not isinstance(recipe, str), "the configuration refuses what has no recipe"
            model.gemm_context = partial(autocast, make_recipe(recipe))
        if gemm.head == "fp8" and model.part.ends:
            wanted: GemmKernel = "te" if config.kernels.gemm == "te" else "auto"
            head = choose_gemm_backend(device, model.dtype, wanted=wanted)
            model.fp8_head = Fp8Head(head, wire("column", parallel))
            model.fp8_head.keeps = not partitioned
    attention, norm = attention_backend(config, device, runs_on), norm_backend(config, device, runs_on)
    activate(attention)
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm):
            module.use(norm)
    for block in model.held_blocks():
        block.attention.use(attention)
        block.one_by_one = partitioned
        if gemm.smooth_swiglu != "off" and report is not None and block.mlp.down.name in report.plans:
            block.mlp.use_smooth_swiglu(gemm.smooth_swiglu)
    return BuiltModel(model, report, attention, norm, compiles=config.train.compile == "block")


def norm_backend(config: Config, device: torch.device, runs_on: RunsOn = on_cuda) -> NormBackend:
    """What computes norms on ``device``; ``runs_on`` as for :func:`build_model`.

    Raises:
        ValueError: not what ``kernels.norm`` says.
        RuntimeError: its package does not load.
    """
    dtype = COMPUTE_DTYPES[config.precision.compute]
    return choose_norm_backend(device, dtype, wanted=config.kernels.norm, runs_on=runs_on)


def attention_backend(config: Config, device: torch.device, runs_on: RunsOn = on_cuda) -> AttentionBackend:
    """What computes attention on ``device``; ``runs_on`` as for :func:`build_model`.

    Raises:
        ValueError: not what ``kernels.attention`` says.
    """
    model, dtype = config.model, COMPUTE_DTYPES[config.precision.compute]
    if model.attention_in_fp32 and dtype == torch.bfloat16:
        dtype = torch.float32
    call = AttentionCall(dtype, model.num_heads, model.num_kv_heads, model.head_dim)
    return choose_attention_backend(
        device,
        call,
        wanted=config.kernels.attention,
        deterministic=config.run.deterministic,
        runs_on=runs_on,
    )


def outline(config: Config, vocab_size: int) -> Decoder:
    """The whole model without storage (on the meta device): names, shapes and what is known of parameters,
    whatever part a process holds."""
    return _decoder(config, vocab_size, torch.device("meta"))


def _decoder(
    config: Config,
    vocab_size: int,
    device: torch.device,
    part: ModelPart | None = None,
    parallel: TensorParallel | None = None,
    context: ContextParallel | None = None,
) -> Decoder:
    return Decoder(
        parametrization(config, vocab_size),
        decay_rule=config.optimizer.decay_rule,
        in_fp8_plan=weights_in_fp8(config),
        dtype=COMPUTE_DTYPES[config.precision.compute],
        device=device,
        activation_checkpointing=config.train.activation_checkpointing,
        fp8_saved=config.precision.activations == "fp8",
        part=part,
        parallel=parallel,
        context=context,
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
    parameters = dict(model.named_parameters())
    values = initial_values((model.specs[fqn] for fqn in parameters), seed)
    for (fqn, parameter), value in zip(parameters.items(), values, strict=True):
        if fqn not in resident:
            parameter.copy_(model.specs[fqn].local(value))
        if seed_master is not None:
            seed_master(fqn, value)
