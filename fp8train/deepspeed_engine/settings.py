"""The JSON that DeepSpeed is configured with, made of the run's configuration.

A person may add settings of DeepSpeed's own in a file (``deepspeed.config``). What follows from the run's
configuration, and what would compete with it, has one place: a file that has it too is refused, whatever its
value. Needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.json_text import read_object

MAX_BYTES = 1_000_000
"""Largest file of settings read."""

_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "fp16": "precision.compute",
    "bf16": "precision.compute",
    "bfloat16": "precision.compute",
    "amp": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision.gradient.accumulate",
    "communication_data_type": "precision.gradient.reduce",
    "prescale_gradients": "the loss, which is a mean over all target tokens",
    "gradient_predivide_factor": "the loss, which is a mean over all target tokens",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "the section checkpoint",
    "data_efficiency": "the section data",
    "curriculum_learning": "the section data",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "pipeline": "parallel.pp",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "compile": "train.compile",
    "steps_per_print": "logging.interval",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.offload",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "optimizer.offload",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_param.device": "deepspeed.offload_param",
    "zero_optimization.offload_param.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.cpu_offload": "optimizer.offload",
    "zero_optimization.cpu_offload_params": "deepspeed.offload_param",
    "zero_optimization.reduce_bucket_size": "precision.gradient.bucket_mib",
    "zero_optimization.contiguous_gradients": "precision.gradient.bucket_mib",
    "zero_optimization.round_robin_gradients": "the partition that checkpoints are made of",
    "zero_optimization.zero_quantized_gradients": "precision.gradient.format",
    "zero_optimization.zero_quantized_weights": "precision.traffic.weights",
}
"""Settings of DeepSpeed, and what says them here."""
_WIDTHS = {"fp32": 4, "bf16": 2}


def deepspeed_json(config: Config, *, dp: int, micro_batches: int, on_cuda: bool) -> dict[str, Any]:
    """All that DeepSpeed is told.

    Args:
        config: with ``engine: deepspeed``.
        dp: data-parallel ranks.
        micro_batches: of a step on one rank.
        on_cuda: whether ranks have GPUs: reduction beside backward, and pinned memory.

    Raises:
        ConfigError: the file of further settings cannot be read, or says what the configuration says.
    """
    return merged(
        _ours(config, dp=dp, micro_batches=micro_batches, on_cuda=on_cuda), further_settings(config)
    )


def _ours(config: Config, *, dp: int, micro_batches: int, on_cuda: bool) -> dict[str, Any]:
    train, gradient = config.train, config.precision.gradient
    in_bf16 = config.precision.compute == "bf16"
    bucket = int(gradient.bucket_mib * 2**20 / _WIDTHS[gradient.accumulate])
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        "reduce_bucket_size": bucket,
        "contiguous_gradients": True,
        "overlap_comm": on_cuda,
        "round_robin_gradients": False,
    }
    for name, place in (
        ("offload_optimizer", config.optimizer.offload),
        ("offload_param", config.deepspeed.offload_param),
    ):
        if place != "none":
            path = {"nvme_path": config.deepspeed.nvme_path} if place == "nvme" else {}
            zero[name] = {"device": place, "pin_memory": on_cuda, **path}
    return {
        "train_batch_size": train.micro_batch_size * micro_batches * dp,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "bf16": {"enabled": in_bf16, "check_grad_overflow": in_bf16},
        "data_types": {"grad_accum_dtype": gradient.accumulate},
        "communication_data_type": gradient.reduce,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def further_settings(config: Config) -> dict[str, Any]:
    """The settings of ``deepspeed.config``; empty without the file.

    Raises:
        ConfigError: it cannot be read as a JSON object, or says what the configuration says.
    """
    name = config.deepspeed.config
    if name is None:
        return {}
    path = Path(name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"deepspeed.config: {path} is larger than {MAX_BYTES:,} bytes; it is no settings"
            )
        settings = read_object(path)
    except OSError as error:
        raise ConfigError(f"deepspeed.config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed.config: {path}: {error}; write {{...}}") from None
    told = [f"{key}, which {_OWNED[key]} says" for key in _keys(settings) if key in _OWNED]
    if told:
        raise ConfigError(
            f"deepspeed.config: {path} defines {'; '.join(told)}: say it once, and remove it from that file"
        )
    _check_whole_norms(config, settings)
    return settings


def _check_whole_norms(config: Config, settings: Mapping[str, Any]) -> None:
    """Norms whose input is kept in FP8 run again within another function's backward, where DeepSpeed gathers
    nothing: their vectors must be among those that it leaves whole."""
    zero, width = settings.get("zero_optimization", {}), config.model.hidden_size
    if config.parallel.zero != 3 or config.precision.activations != "fp8" or not isinstance(zero, dict):
        return
    for key in ("stage3_param_persistence_threshold", "param_persistence_threshold"):
        least = zero.get(key, width)
        if isinstance(least, int) and least < width:
            raise ConfigError(
                f"deepspeed.config: zero_optimization.{key}: {least} cuts norms of {width} elements, and "
                f"precision.activations: fp8 needs them whole; write {width} or more, or "
                "precision.activations=compute"
            )


def _keys(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Dotted names of all settings and sections."""
    for name, value in settings.items():
        key = f"{above}{name}"
        yield key
        if isinstance(value, dict):
            yield from _keys(value, f"{key}.")


def merged(ours: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; no key is in both."""
    result = dict(ours)
    for name, value in further.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            assert name not in result, f"{name} is ours"
            result[name] = value
    return result
