"""The optimizer that DeepSpeed is given: ours over flat vectors, or its CPUAdam for offloaded states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from fp8train.config.schema import Config
from fp8train.models.build import BuiltModel
from fp8train.models.param_spec import ParamSpec
from fp8train.optim.flat_optimizer import FlatOptimizer
from fp8train.optim.parameter_state import in_plan
from fp8train.precision.state_formats import StateFormats
from fp8train.update_rules.registry import rule_named

_Settings = tuple[tuple[str, Any], ...]
"""Of a group of parameters, as items."""


class Client(ABC):
    """An optimizer inside DeepSpeed.

    Attributes:
        optimizer: what DeepSpeed is given.
        ours: the same, where it is ours.
    """

    optimizer: Any
    ours: FlatOptimizer | None

    @abstractmethod
    def begin(self, updates: int, lr_factor: float) -> None:
        """Say what the next step is: how many ``updates`` were made before it, and the schedule's factor on
        the peak rate."""

    @abstractmethod
    def describe(self) -> str:
        """In words, for the header."""


class FlatClient(Client):
    """Our update rules and state formats over DeepSpeed's flat partitions."""

    def __init__(self, config: Config, built: BuiltModel) -> None:
        rule = rule_named(config.optimizer.name)
        parametrization = built.model.parametrization
        settings = config.optimizer.model_dump() | {
            "eps": config.optimizer.eps * parametrization.eps_unit,
            "bounded_update": config.precision.state.bounded_update,
        }
        plain = StateFormats() if rule.has_second_moment else StateFormats(exp_avg_sq=None)

        def settings_of(spec: ParamSpec) -> _Settings:
            formats = config.state_formats if in_plan(spec) else plain
            return (("formats", formats), ("decay", spec.decay), ("lr_mult", spec.lr_mult))

        groups = [
            {**dict(own), "params": parameters} for own, parameters in _grouped(built, settings_of).items()
        ]
        unscale = 1 / parametrization.gradient_scale if parametrization.true_gradients else 1.0
        self.ours = self.optimizer = FlatOptimizer(
            groups, rule.of(settings), seed=config.run.seed, grad_multiplier=unscale
        )

    def begin(self, updates: int, lr_factor: float) -> None:
        """Set the rates of the next step; the optimizer counts updates itself."""
        self.optimizer.schedule(lr_factor)

    def describe(self) -> str:
        """Say which rule it is, and whose."""
        return f"{self.optimizer.rule.name} of this package over flat partitions"


class CpuAdamClient(Client):
    """DeepSpeed's CPUAdam, whose states rest where ``optimizer.offload`` says."""

    ours = None

    def __init__(self, config: Config, built: BuiltModel) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        settings = config.optimizer

        def settings_of(spec: ParamSpec) -> _Settings:
            decay = settings.weight_decay if spec.decay is not None else 0.0
            lr = settings.lr * spec.lr_mult
            return (("lr", lr), ("peak_lr", lr), ("weight_decay", decay))

        groups = [
            {**dict(own), "params": parameters} for own, parameters in _grouped(built, settings_of).items()
        ]
        self._settings = settings
        betas = settings.beta1, settings.beta2
        self.optimizer = DeepSpeedCPUAdam(groups, betas=betas, eps=settings.eps, adamw_mode=True)

    def begin(self, updates: int, lr_factor: float) -> None:
        """Set rates and count. DeepSpeed's kernel multiplies powers of the betas from step to step, and a
        resumed run has them from the count of steps: so that both have the same bits, every step has."""
        adam, s = self.optimizer, self._settings
        adam.ds_opt_adam.create_adam(adam.opt_id, s.lr, s.beta1, s.beta2, s.eps, 0.0, True, False)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        for state in self.optimizer.state.values():
            if state:
                state["step"] = updates  # its own count has a step that only made the states

    def describe(self) -> str:
        """Say whose optimizer it is."""
        return "adamw by DeepSpeed's CPUAdam"


def make_client(config: Config, built: BuiltModel) -> Client:
    """The optimizer of a run, over the model's parameters, which DeepSpeed flattens by group."""
    return (FlatClient if config.optimizer.offload == "none" else CpuAdamClient)(config, built)


def _grouped(
    built: BuiltModel, settings_of: Callable[[ParamSpec], _Settings]
) -> dict[_Settings, list[nn.Parameter]]:
    """Parameters by the settings of their group."""
    found: dict[_Settings, list[nn.Parameter]] = {}
    for fqn, parameter in built.model.named_parameters():
        found.setdefault(settings_of(built.model.specs[fqn]), []).append(parameter)
    return found
