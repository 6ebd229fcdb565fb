"""What a run with ``engine: deepspeed`` stores, for the header."""

from __future__ import annotations

import math
from collections.abc import Collection

from fp8train.deepspeed_engine.trainer import DeepSpeedTrainer
from fp8train.live.stored_bytes import Footprint, StoredBytes
from fp8train.optim.parameter_state import in_plan


def stored_bytes(trainer: DeepSpeedTrainer) -> StoredBytes:
    """The bytes that DeepSpeed keeps of this rank's share, by its documentation: computed, not counted."""
    specs = trainer.outline.specs
    linears = {f"{path}.weight" for path in trainer.outline.linears()}
    planned = {fqn for fqn in linears if specs[fqn].in_fp8_plan}
    return StoredBytes(*(_footprint(trainer, fqns) for fqns in (planned, linears, set(specs))))


def _footprint(trainer: DeepSpeedTrainer, fqns: Collection[str]) -> Footprint:
    """Of parameters with these names: what is cut over ranks counts with its share."""
    config, ranks, specs = trainer.config, trainer.processes.dp.size, trainer.outline.specs
    compute = 2 if config.precision.compute == "bf16" else 4
    gradient = 2 if config.precision.gradient.accumulate == "bf16" else 4
    elements = sum(math.prod(specs[fqn].global_shape) for fqn in fqns)
    share = elements // ranks
    values = {"weight": 0, "gradient": 0, "accumulator": 0}
    values["weight"] = (share if trainer.stage == 3 else elements) * compute
    values["gradient"] = (elements if trainer.stage == 1 else share) * gradient
    values["master"] = share * 4
    scales = {"weight": 0, "gradient": 0}
    formats = config.precision.state.value().formats()
    for role in trainer.optimizer.states.roles[1:]:
        fmt = formats[role]
        of_plan = sum(math.prod(specs[fqn].global_shape) for fqn in fqns if in_plan(specs[fqn])) // ranks
        width = {"fp32": 4, "bf16": 2, "fp16_scaled": 2}.get(fmt.format, 1)
        values[role] = of_plan * width + (share - of_plan) * 4
        scales[role] = of_plan // fmt.block * 4 if fmt.in_blocks else 0
    return Footprint(elements, values, scales)


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
