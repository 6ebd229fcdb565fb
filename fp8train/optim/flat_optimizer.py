"""The update rules as a ``torch.optim.Optimizer`` over flat FP32 vectors, moments in formats of ours.

Whoever partitions by elements (DeepSpeed's ZeRO) joins the parameters of a group to one vector, gives each
rank a range of it, and hands a client optimizer these FP32 ranges, with ``.grad`` beside them, one group or a
part of one at a time. The range *is* the master weight; the moments are stored here as
:mod:`fp8train.precision.state_formats` says.

A range knows no rows: blocks are the format's largest, counted from the range's first element, and the last
may be short. Where a row and a parameter's place in the range are multiples of the block, scales are those of
:class:`~fp8train.optim.optimizer.Optimizer`; elsewhere a block may span two rows, or two parameters. Formats
with one scale per tensor are refused: a range has no tensors.

Random bits of stochastic rounding are drawn by name and by index in the whole vector, so they do not depend
on how many ranks share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.config.optimizer_schema import DecayRule
from fp8train.numerics.stochastic import stream_key
from fp8train.optim.make_storage import make_master_storage, make_storage
from fp8train.optim.optimizer import CHUNK, GPU_CHUNK
from fp8train.optim.state_storage import StatePlace, Storage
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.rule import Load, MatrixRule, Rule, StepScalars


@dataclass
class _Range:
    """A flat parameter: its moments, and how many updates it has had.

    Attributes:
        edges: FP32 blocks that :meth:`FlatOptimizer.set_moment` wrote in part, by role and number.
    """

    name: str
    storages: dict[str, Storage]
    step: int = 0
    edges: dict[tuple[str, int], Tensor] = field(default_factory=dict)


class FlatOptimizer(torch.optim.Optimizer):
    """An update rule over flat FP32 parameters. Groups may have, besides ``params``:

    * ``formats``: :class:`~fp8train.precision.state_formats.StateFormats`, master FP32; default: all FP32.
    * ``decay``: how weights decay (:data:`~fp8train.config.optimizer_schema.DecayRule`); default None: not.
    * ``lr_mult``: multiplies the rate; default 1.
    * ``lr``, ``lr_factor``: the scheduled rate before ``lr_mult``, and what of the rule's own it is;
      :meth:`schedule` sets both.
    """

    def __init__(
        self,
        params: Any,
        rule: Rule,
        *,
        seed: int,
        grad_multiplier: float = 1.0,
        chunk: int | None = None,
    ) -> None:
        """Args: ``params``: parameters or groups of them, which others may replace before the first step;
        ``rule``: works on elements; ``seed``: of stochastic rounding; ``grad_multiplier``: of every gradient;
        ``chunk``: most elements that are decoded at once.

        Raises:
            ValueError: the rule needs whole matrices; formats that a flat vector cannot have.
        """
        if isinstance(rule, MatrixRule):
            raise ValueError(
                f"{rule.name} updates whole matrices, and a flat partition has none; take another rule"
            )
        self.rule, self._seed, self._chunk = rule, seed, chunk
        self.grad_multiplier = grad_multiplier
        self._ranges: dict[Tensor, _Range] = {}
        second = StateFormat() if rule.has_second_moment else None
        defaults = {
            "lr": rule.settings.lr,
            "lr_factor": 1.0,
            "lr_mult": 1.0,
            "decay": None,
            "formats": StateFormats(exp_avg_sq=second),
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own.

        Raises:
            ValueError: formats that a flat vector cannot have, or that are not the rule's.
        """
        formats = param_group.get("formats", self.defaults["formats"])
        if formats.master != StateFormat():
            raise ValueError(
                f"master weights in {formats.master}: those of a flat optimizer are the FP32 partitions"
            )
        if (formats.exp_avg_sq is not None) != self.rule.has_second_moment:
            keeps = "a" if self.rule.has_second_moment else "no"
            raise ValueError(
                f"{self.rule.name} keeps {keeps} second moment, but its format is {formats.exp_avg_sq}"
            )
        for role, fmt in formats.formats().items():
            if fmt.two_pass or fmt.format == "fp64":
                raise ValueError(
                    f"{role} in {fmt}: a flat partition is FP32 and has no tensors that could share a scale; "
                    "write granularity: block, or an unscaled format"
                )
        super().add_param_group(param_group)

    def schedule(self, lr_factor: float) -> None:
        """Set the rate of the next steps: this factor on the rule's own, in every group."""
        for group in self.param_groups:
            group["lr_factor"], group["lr"] = lr_factor, self.rule.settings.lr * lr_factor

    def place(self, parameter: Tensor, formats: StateFormats, *, name: str, offset: int = 0) -> None:
        """Allocate the moments of a flat parameter, zeros. Called for those that have a place in a larger
        vector; a step places all others by themselves.

        Args:
            parameter: FP32 [n].
            formats: of its group.
            name: of the vector, for random bits.
            offset: index in it of the first element.
        """
        assert parameter not in self._ranges, f"{name} is placed already"
        assert parameter.dim() == 1 and parameter.dtype == torch.float32, f"{name}: flat FP32 vectors only"
        storages = {
            role: make_storage(fmt, _place(parameter, fmt, offset), wide=torch.float32)
            for role, fmt in formats.formats().items()
            if role != "master"
        }
        self._ranges[parameter] = _Range(name, storages)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient, in the groups as they are now."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, f"{number}.{index}")
        return result

    def _update(self, parameter: Tensor, group: Mapping[str, Any], default_name: str) -> None:
        formats: StateFormats = group["formats"]
        if parameter not in self._ranges:
            self.place(parameter, formats, name=group.get("name", default_name))
        kept = self._ranges[parameter]
        assert not kept.edges, f"{kept.name}: moments were set in part; call finish_moments()"
        kept.step += 1
        lr = group["lr"] * group["lr_mult"]
        rounded = any(not fmt.is_exact for role, fmt in formats.formats().items() if role != "master")
        scalars = StepScalars(kept.step, lr, self._decay(group, lr), rounded)
        keys = {role: self._key(kept, role, fmt) for role, fmt in formats.formats().items()}
        master = StateFormat()
        storages = kept.storages | {
            "master": make_master_storage(
                master, _place(parameter, master, 0), wide=torch.float32, weight=parameter.detach()
            )
        }
        grad = parameter.grad
        assert grad is not None
        for start, stop in self._spans(parameter, storages):
            load = _loader(storages, start, stop)
            gradient = grad[start:stop].float()
            if self.grad_multiplier != 1.0:
                gradient = gradient * self.grad_multiplier
            for role, values in self.rule.new_values(scalars, gradient, load):
                _store(storages[role], start, values, keys[role])

    def _key(self, kept: _Range, role: str, fmt: StateFormat) -> int | None:
        return None if fmt.rounding == "nearest" else stream_key(self._seed, kept.step, f"{role}/{kept.name}")

    def _decay(self, group: Mapping[str, Any], lr: float) -> float:
        """The share of the weight that this step removes."""
        decay: DecayRule | None = group["decay"]
        settings = self.rule.settings
        if decay is None:
            return 0.0
        if decay == "lr_times_lambda":
            return lr * settings.weight_decay
        factor = group["lr_factor"]
        if settings.lr * factor != group["lr"]:  # somebody else's schedule
            factor = group["lr"] / settings.lr
        return settings.weight_decay * factor if decay == "independent" else settings.weight_decay

    def _spans(self, parameter: Tensor, storages: Mapping[str, Storage]) -> Iterator[tuple[int, int]]:
        limit = self._chunk or (CHUNK if parameter.device.type == "cpu" else GPU_CHUNK)
        unit = _common_unit(storages)
        chunk = max(unit, limit // unit * unit)
        starts = range(0, parameter.numel(), chunk)
        return ((start, min(start + chunk, parameter.numel())) for start in starts)

    def step_of(self, parameter: Tensor) -> int:
        """How many updates a flat parameter has had."""
        return self._ranges[parameter].step if parameter in self._ranges else 0

    def set_step(self, parameter: Tensor, step: int) -> None:
        """Continue after ``step`` updates of a placed parameter."""
        self._ranges[parameter].step = step

    @torch.no_grad()
    def moment(self, parameter: Tensor, role: str, start: int, stop: int) -> Tensor:
        """The values of a moment's elements ``start .. stop``: FP32 [stop - start], a new tensor."""
        storage = self._ranges[parameter].storages[role]
        unit = storage.place.block
        first = start // unit * unit
        last = min(-(-stop // unit) * unit, storage.place.numel)
        return storage.load(first, last)[start - first : stop - first].clone()

    @torch.no_grad()
    def set_moment(self, parameter: Tensor, role: str, start: int, values: Tensor) -> None:
        """Encode new values of a moment, rounded to nearest, from element ``start`` on: FP32 [count].

        Ranges may come in any order and cut blocks: a block is encoded from all values that it was given,
        until :meth:`finish_moments`. Values that :meth:`moment` gave of the same blocks are stored as they
        were.
        """
        kept = self._ranges[parameter]
        storage = kept.storages[role]
        block, stop = storage.place.block, start + len(values)
        first, last = -(-start // block) * block, stop // block * block  # whole blocks between
        if first < last:
            storage.restore(first, last, values[first - start : last - start].clone())
            for key in [key for key in kept.edges if key[0] == role and first <= key[1] * block < last]:
                del kept.edges[key]
        for number in {start // block, (stop - 1) // block} if len(values) else ():
            begin, end = number * block, min((number + 1) * block, storage.place.numel)
            if first <= begin < last:
                continue
            edge = kept.edges.setdefault((role, number), storage.load(begin, end).clone())
            low, high = max(start, begin), min(stop, end)
            edge[low - begin : high - begin] = values[low - start : high - start]
            storage.restore(begin, end, edge.clone())

    def finish_moments(self) -> None:
        """Forget what blocks were given in part: all ranges are set."""
        for kept in self._ranges.values():
            kept.edges.clear()

    def moments_bytes(self) -> int:
        """Bytes of all moments, scales included."""
        return sum(one.nbytes for kept in self._ranges.values() for one in kept.storages.values())

    def state_dict(self) -> dict[str, Any]:
        """Moments as they are stored, by index of the parameter: tensors, numbers and strings."""
        indices = {id(p): i for i, p in enumerate(self._parameters())}
        state = {
            indices[id(parameter)]: {
                "name": kept.name,
                "step": kept.step,
                **{
                    f"{role}{suffix}": tensor
                    for role, storage in kept.storages.items()
                    for suffix, tensor in storage.tensors().items()
                },
            }
            for parameter, kept in self._ranges.items()
            if id(parameter) in indices
        }
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "formats")}
            | {"params": [indices[id(p)] for p in group["params"]], "formats": _told(group["formats"])}
            for group in self.param_groups
        ]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy what :meth:`state_dict` gave back, bit by bit.

        Raises:
            ValueError: other formats or sizes than this optimizer's.
        """
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the saved state has {len(groups)} groups, the optimizer {len(self.param_groups)}"
            )
        parameters = list(self._parameters())
        for number, (saved, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            if saved["formats"] != _told(group["formats"]):
                raise ValueError(
                    f"group {number} has moments in {_told(group['formats'])}, the saved state in "
                    f"{saved['formats']}; hand over decoded moments to change formats (set_moment)"
                )
            group.update({k: v for k, v in saved.items() if k not in ("params", "formats")})
            for index in saved["params"]:
                if index in state_dict["state"]:
                    self._load(parameters[index], group["formats"], state_dict["state"][index])

    def _load(self, parameter: Tensor, formats: StateFormats, saved: Mapping[str, Any]) -> None:
        if parameter not in self._ranges:
            self.place(parameter, formats, name=saved["name"])
        kept = self._ranges[parameter]
        kept.step = saved["step"]
        for role, storage in kept.storages.items():
            for suffix, tensor in storage.tensors().items():
                found = saved[role + suffix]
                if found.shape != tensor.shape:
                    raise ValueError(f"{kept.name}: {role} has {tensor.shape}, the saved state {found.shape}")
                tensor.copy_(found)

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])


def _told(formats: StateFormats) -> str:
    return ", ".join(f"{role} {fmt}" for role, fmt in formats.formats().items() if role != "master")


def _place(parameter: Tensor, fmt: StateFormat, offset: int) -> StatePlace:
    """Blocks from the first element on, the last one filled up with zeros."""
    block = fmt.block if fmt.in_blocks else 1
    whole = -(-parameter.numel() // block) * block
    return StatePlace((whole,), block, offset, parameter.device)


def _common_unit(storages: Mapping[str, Storage]) -> int:
    return math.lcm(*(storage.place.unit for storage in storages.values()))


def _filled(count: int, storage: Storage) -> int:
    block = storage.place.block
    return -(-count // block) * block


def _loader(storages: Mapping[str, Storage], start: int, stop: int) -> Load:
    """Old values of elements ``start .. stop``, without what fills the last block."""

    def load(role: str) -> Tensor:
        storage = storages[role]
        return storage.load(start, start + _filled(stop - start, storage))[: stop - start]

    return load


def _store(storage: Storage, start: int, values: Tensor, key: int | None) -> None:
    short = _filled(len(values), storage) - len(values)
    values = F.pad(values, (0, short)) if short else values
    storage.store(start, start + len(values), values, key)
