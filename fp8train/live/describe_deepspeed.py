"""What a run with ``engine: deepspeed`` stores, for the header."""

from __future__ import annotations

from fp8train.deepspeed_engine.trainer import DeepSpeedTrainer
from fp8train.live.deepspeed_bytes import partitioned_bytes
from fp8train.live.stored_bytes import StoredBytes


def stored_bytes(trainer: DeepSpeedTrainer) -> StoredBytes:
    """What this rank stores; computed, not counted."""
    specs = trainer.outline.specs
    linears = [f"{path}.weight" for path in trainer.outline.linears()]
    return partitioned_bytes(
        trainer.config,
        {fqn: spec.global_shape for fqn, spec in specs.items()},
        linears=linears,
        planned=[fqn for fqn in linears if specs[fqn].in_fp8_plan],
        dp=trainer.processes.dp.size,
    )


def describe_engine(trainer: DeepSpeedTrainer) -> list[str]:
    """Lines for the header: what DeepSpeed does here."""
    config, version = trainer.config, trainer.library_version
    offload, parameters = config.optimizer.offload, config.deepspeed.offload_param
    kept = "" if offload == "none" else f", optimizer states in {_place(offload)}"
    rest = "" if parameters == "none" else f", parameters in {_place(parameters)}"
    wire = config.precision.gradient.reduce
    fp8 = config.precision.gradient.format
    exchanged = f"; gradients of the FP8 plan travel in {fp8}" if fp8 != "high_precision" else ""
    return [
        f"engine: DeepSpeed {version}, ZeRO-{trainer.stage}{kept}{rest}; {trainer.client.describe()}; "
        f"gradients reduced in {wire}{exchanged}"
    ]


def _place(name: str) -> str:
    return {"cpu": "host memory", "nvme": "files on a local disk"}[name]
