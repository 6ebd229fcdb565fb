"""A trainer whose gradients, master weights and partition are DeepSpeed's.

A step is the one of :mod:`fp8train.step.trainer` in other hands. Each micro-batch's summed loss is divided by
the *global* number of target tokens and multiplied by the ranks, for DeepSpeed averages over them: the
gradient is that of the mean loss over all tokens, as with our own engine. DeepSpeed reduces while backward
goes on, finds the norm, clips, and skips a step whose norm is not finite. Its optimizer is ours over its flat
partitions (:mod:`fp8train.optim.flat_optimizer`), or its own CPUAdam where states are offloaded.

Checkpoints are those of our engine: :attr:`DeepSpeedTrainer.optimizer` is a copy of this rank's rows of all
masters and moments, in FP32 in host memory, which is filled before a checkpoint is written and handed to
DeepSpeed after one was read.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.ranks import Ranks
from fp8train.comm.processes import Processes
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.config.world import accumulation_steps
from fp8train.deepspeed_engine.exchange_states import MASTER, Partitions
from fp8train.deepspeed_engine.optimizers import make_client
from fp8train.deepspeed_engine.settings import deepspeed_json
from fp8train.models.build import build_model, initialise, outline
from fp8train.models.connect import connect_linears, make_fp8_parts
from fp8train.optim.optimizer import Optimizer
from fp8train.optim.parameter_state import Region
from fp8train.optim.schedule import lr_factor
from fp8train.parallel.zero import partition
from fp8train.precision.state_formats import StateFormats
from fp8train.step.assemble import all_reduce_max
from fp8train.step.base_trainer import BaseTrainer
from fp8train.step.measured import Measured
from fp8train.step.result import StepResult
from fp8train.step.targets import inputs_and_targets
from fp8train.step.verdict import judge
from fp8train.update_rules.registry import rule_named


class DeepSpeedTrainer(BaseTrainer):
    """Model of one process, whose gradients and optimizer states DeepSpeed keeps.

    Attributes:
        engine: DeepSpeed's.
        client: the optimizer inside it.
        optimizer: this rank's rows of all states as checkpoints see them, on the CPU; current after
            :meth:`pull`.
    """

    def __init__(
        self, config: Config, processes: Processes, *, vocab_size: int, ignore_after: int | None = None
    ) -> None:
        """Build everything and fill in the values of step 0. Collective over all ranks."""
        self.stage = config.parallel.zero
        os.environ.setdefault("DS_ACCELERATOR", processes.device.type)  # read when DeepSpeed is imported
        built = build_model(
            config, vocab_size=vocab_size, device=processes.device, partitioned=self.stage == 3
        )
        whole = outline(config, vocab_size)  # DeepSpeed takes the parameters' storage
        super().__init__(config, processes, built, whole, ignore_after=ignore_after)
        self.parts = make_fp8_parts(built, recorder=self.monitors.recorder)
        self.scales = self.monitors.scales = self.parts.scales
        connect_linears(built, self.parts)
        self._scale_events = self._watch_scales()
        self.optimizer = self._checkpointed_states()
        initialise(self.model, config.run.seed, self.optimizer.states.seed_master)
        self._build_operators()
        self.client = make_client(config, built)
        self.engine = self._make_engine(config)
        for module, parameter in self.model.borrowed_weights():
            _library().zero.register_external_parameter(module, parameter)
        parameters = dict(self.model.named_parameters())
        self._partitions = Partitions(self.engine, parameters, self.client.ours, processes.device)
        if self.stage == 3:
            self.monitors.whole = self._whole
        self._reduce_in_fp8()
        self.push(roles=(MASTER,))

    def _reduce_in_fp8(self) -> None:
        """Have gradients of the FP8 plan travel in FP8, if the configuration says so."""
        gradients, fp8 = self.config.precision.gradient.value(), self.built.fp8
        if gradients.format is None or fp8 is None:
            return
        from fp8train.deepspeed_engine.fp8_reduction import Fp8ReducingZeroOptimizer

        linears = self.model.linears()
        Fp8ReducingZeroOptimizer.adopt(
            self.engine.optimizer,
            [linears[path].weight for path in fp8.converted],
            fmt=gradients.format,
            block=gradients.fp8.block,
            group=self.processes.replicas,
        )

    def _build_operators(self) -> None:
        """Compile DeepSpeed's operators on one rank of each node, if they are not there; the others wait, for
        they would otherwise load what is half written."""
        names = {self.config.optimizer.offload, self.config.deepspeed.offload_param} - {"none"}
        if not names:
            return
        _library()
        from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

        builders = [CPUAdamBuilder()] if self.config.optimizer.offload != "none" else []
        builders += [AsyncIOBuilder()] if "nvme" in names else []
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        problem = None
        if first:
            try:
                for builder in builders:
                    builder.load(verbose=False)
            except (RuntimeError, ImportError, OSError) as error:  # no compiler, no libaio
                problem = f"{builder.name}: {str(error).strip().splitlines()[-1]}"
        problems = Ranks(self.processes.control).each(lambda: problem)
        if any(problems):
            raise ConfigError(
                f"engine: deepspeed: {next(filter(None, problems))}\nit is compiled at first use, "
                "with g++ and ninja, and libaio for nvme (apt-get install g++ libaio-dev); mend that, or "
                "write optimizer.offload=none and deepspeed.offload_param=none"
            )

    def _checkpointed_states(self) -> Optimizer:
        """States of this rank's rows, FP32 on the CPU: what a checkpoint is made of."""
        specs, replicas = self.outline.specs, self.processes.replicas
        shapes = {fqn: spec.global_shape for fqn, spec in specs.items()}
        parameters, regions = {}, {}
        for fqn, rows in partition(shapes, replicas.size, "rows").owned(replicas.rank).items():
            shape = (len(rows), *shapes[fqn][1:])
            parameters[fqn] = torch.zeros(shape)
            regions[fqn] = Region(shape, (rows.start, *(0 for _ in shapes[fqn][1:])))
        rule = rule_named(self.config.optimizer.name)
        settings = self.config.optimizer.model_dump() | {"bounded_update": False}
        formats = StateFormats() if rule.has_second_moment else StateFormats(exp_avg_sq=None)
        cpu = torch.device("cpu")
        return Optimizer(
            rule.of(settings),
            parameters,
            specs,
            formats,
            seed=self.config.run.seed,
            regions=regions,
            device=cpu,
        )

    def _make_engine(self, config: Config) -> Any:
        dp = self.processes.dp.size
        settings = deepspeed_json(
            config,
            dp=dp,
            micro_batches=accumulation_steps(config, dp),
            on_cuda=self.processes.device.type == "cuda",
        )
        settings["gradient_clipping"] = config.optimizer.clip_grad_norm / self._unscale
        _library()
        _join_alone(self.processes.device)
        from fp8train.deepspeed_engine.engine_class import make_engine

        return make_engine(self.model, self.client.optimizer, settings)

    def step(self, step: int, micro_batches: Tensor) -> StepResult:
        """Run optimizer step ``step`` (0-based); see :class:`~fp8train.step.base_trainer.BaseTrainer`."""
        self.monitors.before_step(step + 1)
        inputs, targets = (self._part(t) for t in inputs_and_targets(micro_batches, self.ignore_after))
        num_targets = self._global_token_count(targets)
        factor = lr_factor(self.config.schedule, step, self.config.total_steps)
        self.client.begin(self.updates, factor)
        with nullcontext() if self.scales is None else self.scales.recording():
            total = self._accumulate(inputs, targets, self._loss_factor(num_targets))
            self.processes.replicas.all_reduce(total, purpose="loss")()
            self.progress.enter("optimizer")  # it reduces what is left there, too
            self.engine.step()
        applied = self.engine.was_step_applied()
        if self.scales is not None:
            self.scales.advance(partial(all_reduce_max, self.processes.stage), applied=applied)
        self._forget_casts()  # DeepSpeed writes weights at the same addresses, and leaves no trace of it
        self.updates += applied
        no_targets = not applied and not num_targets > 0
        norm = self._norm(no_targets=no_targets)
        # DeepSpeed has read the norm by now, so its update is on its way, and the loss before it.
        seen = Measured.read(total, torch.tensor(norm, dtype=torch.float64), num_targets, total)
        verdict = judge(
            self.monitors, step + 1, loss=seen.loss, grad_norm=norm, num_targets=seen.num_targets, late=True
        )
        loss = total * torch.nan if no_targets else total / max(seen.num_targets, 1)
        skipped = "" if applied else (verdict.skipped or "not_finite")
        lr = self.config.optimizer.lr * factor
        return StepResult(loss, norm, lr, skipped, events=verdict.events, rewind=verdict.rewind)

    def _accumulate(self, inputs: Tensor, targets: Tensor, factor: Tensor | float) -> Tensor:
        """Forward and backward of all micro-batches; this rank's summed loss, an FP64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for number, (x, y) in enumerate(zip(inputs, targets, strict=True), 1):
            self.engine.set_gradient_accumulation_boundary(number == len(inputs))
            self.progress.enter("forward")
            loss_sum = self.engine(x, y)
            self.progress.enter("backward")
            self.engine.backward(loss_sum * factor, scale_wrt_gas=False)
            total += loss_sum.detach()
        return total

    def _loss_factor(self, num_targets: Tensor | int) -> Tensor | float:
        """What a micro-batch's summed loss is multiplied by; NaN, which DeepSpeed skips a step for, where no
        rank has a target."""
        factor = self.model.parametrization.gradient_scale * self.processes.dp.size
        if isinstance(num_targets, int):
            return factor / num_targets
        return torch.where(num_targets > 0, factor / num_targets, torch.nan).float()

    def _norm(self, *, no_targets: bool) -> float:
        """Norm of the gradients before clipping, as DeepSpeed found it in FP32."""
        norm = self.engine.get_global_grad_norm()
        return 0.0 if no_targets else math.inf if norm is None else float(norm) * self._unscale

    def pull(self) -> None:
        """Fill :attr:`optimizer` with what DeepSpeed holds. Collective."""
        states = self.optimizer.states
        for fqn, spec in self.outline.specs.items():
            for role in states.roles:
                value = self._partitions.read(fqn, role, spec.global_shape)
                if fqn in states:
                    state = states[fqn]
                    rows = slice(state.region.offset[0], state.region.offset[0] + state.region.shape[0])
                    state.storages[role].store(0, state.numel, value[rows].reshape(-1).cpu(), None)

    def push(self, roles: Iterable[str] | None = None) -> None:
        """Give DeepSpeed what :attr:`optimizer` holds, and the model the masters' rounding. Collective."""
        states, device = self.optimizer.states, self.processes.device
        for fqn, spec in self.outline.specs.items():
            for role in states.roles if roles is None else roles:
                value = torch.zeros(spec.global_shape, device=device)
                if fqn in states:
                    state = states[fqn]
                    rows = slice(state.region.offset[0], state.region.offset[0] + state.region.shape[0])
                    value[rows] = states.decoded(fqn, role).view(state.region.shape).to(device)
                self.processes.replicas.all_reduce(value, purpose="setup")()  # rows of others are zeros
                self._partitions.write(fqn, role, value)
        self._partitions.publish(self.updates)
        self._forget_casts()

    def checkpoint_tensors(self) -> dict[str, Tensor | LogicalTensor]:
        """Fetch what DeepSpeed holds, and return what a checkpoint is made of. Collective."""
        self.pull()
        return super().checkpoint_tensors()

    def restored(self, meta: Mapping[str, Any]) -> None:
        """Finish loading: hand the states to DeepSpeed. Collective."""
        self.updates = meta["updates"]
        self.monitors.load_state(meta)
        if self._scale_events is not None:
            self._scale_events.forget()
        self.push()

    def replicated_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Return what all data-parallel ranks hold alike: nothing under ZeRO-3, where they hold parts."""
        return [] if self.stage == 3 else super().replicated_parameters()

    @property
    def library_version(self) -> str:
        """Version of DeepSpeed."""
        return str(_library().__version__)

    def sent_bytes(self) -> dict[str, int]:
        """Bytes that this package has sent itself: DeepSpeed's own traffic is not among them."""
        groups = self.processes.groups
        return {f"{name}/{key}": count for name, group in groups.items() for key, count in group.sent.items()}

    def _whole(self) -> Any:
        return _library().zero.GatheredParameters(list(self.model.parameters()))


def _library() -> Any:
    """DeepSpeed, imported quietly: what it says of itself is in the header."""
    # It calls collectives of torch by names that newer versions of torch are about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _join_alone(device: torch.device) -> None:
    """DeepSpeed wants a process group also where there is one process."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
