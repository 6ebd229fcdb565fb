"""One optimizer step, and what a checkpoint must hold to repeat it.

A step, for this rank's micro-batches: forward gives the summed loss, divided by the *global* number of target
tokens; backward fills the gradient store, which reduces while backward goes on; the norm of all gradients
gives one clip factor; the optimizer reads gradient and state and writes new weights. A step whose gradient is
not finite changes nothing, on all ranks together (the norm is of the reduced gradients, so all ranks see the
same one); nor does one without a single target token, which has no gradient.

What the *next* step starts from (scale state, residuals) moves only with an applied step. Nothing that this
step's values were made with is changed by that: they carry their scales with them.

With ``train.gradient_release`` the optimizer reads and forgets buckets of gradients while backward goes on
(:mod:`fp8train.parallel.gradients.release`). It writes master weights, moments and high-precision weights
then; FP8 weights, ZeRO's distribution and everything that the next step starts from wait for the end, as
without it. A step whose gradient stops being finite in the middle of backward is then taken partly.

With pipeline stages, micro-batches run under the pipeline's schedule (:mod:`fp8train.parallel.pipeline`)
instead of one after the other; the rest is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp8train.checkpoint.logical import LogicalTensor
from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.config.world import accumulation_steps, check_pipeline, check_release
from fp8train.kernels.runs_on import RunsOn, on_cuda
from fp8train.layers.loss import IGNORE
from fp8train.models.build import BuiltModel, build_model, initialise, outline
from fp8train.models.connect import connect_linears, make_fp8_parts
from fp8train.optim.clipping import clip_multiplier
from fp8train.optim.schedule import lr_factor
from fp8train.parallel.gradients.held import GradientReader
from fp8train.parallel.gradients.store import GradientStore
from fp8train.parallel.pipeline import ZERO_BUBBLE, Pipeline, StagePlacement
from fp8train.parallel.stages import part_of, plan_stages
from fp8train.parallel.zero import Partition
from fp8train.step.assemble import all_reduce_max, make_gradient_buckets, make_run_optimizer, tensor_parallel
from fp8train.step.monitors import Monitors
from fp8train.step.non_finite import norm_and_whether_applied
from fp8train.step.recorded import CudaGraphs, RecordedStep, Recorder
from fp8train.step.result import StepResult
from fp8train.step.scale_events import ScaleEvents
from fp8train.step.sharding import Sharding, make_gather, make_partition
from fp8train.step.targets import inputs_and_targets


def place_stages(config: Config, processes: Processes, vocab_size: int) -> StagePlacement | None:
    """Which pipeline rank holds which stage; None with one stage."""
    pp = processes.pp
    assert pp.size == config.parallel.pp, f"{pp.size} pipeline ranks, parallel.pp is {config.parallel.pp}"
    if pp.size == 1:
        return None
    stages = plan_stages(config, vocab_size)
    return StagePlacement(stages, config.parallel.pipeline.schedule, pp=pp.size, rank=pp.rank)


class Trainer:
    """Model, gradient store and optimizer of one process.

    Attributes:
        built: the model, or what this rank's pipeline stages hold of it, and its FP8 plan.
        outline: the whole model, without storage where this rank holds a part.
        pipeline: None with one stage.
        gradients: how gradients are stored and reduced, and the scale state of that.
        store: gradients.
        parts: recorder, scale state and FP8 weights of the linears.
        sharding: this rank's share of the optimizer; None without ZeRO.
        optimizer: master weights and moments.
        scales: state of delayed scales; None if there are none.
        updates: optimizer steps applied (skipped ones do not count).
        monitors: what is watched, and the guard.
        recorded: forward and backward as CUDA graphs; None runs them eagerly.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        *,
        vocab_size: int,
        ignore_after: int | None = None,
        recorder: Recorder | None = None,
        runs_on: RunsOn = on_cuda,
    ) -> None:
        """Build everything and fill in the values of step 0. ``recorder``: in place of CUDA's, where
        ``run.cuda_graphs`` asks for one; ``runs_on``: where the kernels of other packages run."""
        self.config, self.processes, self.ignore_after = config, processes, ignore_after
        placement = place_stages(config, processes, vocab_size)
        self.built: BuiltModel = build_model(
            config,
            vocab_size=vocab_size,
            device=processes.device,
            part=None if placement is None else part_of(placement.held),
            parallel=tensor_parallel(config, processes),
            context=None if processes.cp.size == 1 else ContextParallel(processes.cp),
            runs_on=runs_on,
        )
        self.model = self.built.model
        in_parts = placement is not None or processes.tp.size > 1
        self.outline = outline(config, vocab_size) if in_parts else self.model
        rule = self.model.parametrization
        self._unscale = 1 / rule.gradient_scale if rule.true_gradients else 1.0
        weights = [rule.norm_weight(spec) for spec in self.outline.specs.values()]
        self._norm_weights: Tensor | None = None  # all 1: nothing to multiply
        if any(weight != 1.0 for weight in weights):
            self._norm_weights = torch.tensor(weights, dtype=torch.float64, device=processes.device)
        self.updates = 0
        contributions = accumulation_steps(config, processes.dp.size)
        self.monitors = Monitors(config, processes, self.built)
        owners = make_partition(config, processes, self.built)
        self.gradients = make_gradient_buckets(
            config,
            processes,
            self.built,
            outline=self.outline,
            owners=owners,
            contributions=contributions,
            recorder=self.monitors.recorder,
            runs_on=runs_on,
        )
        self.pipeline: Pipeline | None = None
        if placement is None:
            check_release(config, contributions)
            self.store = GradientStore(
                self.model,
                self.gradients,
                parts=processes.tp,
                whole=self._whole(),
                update=self._update_released if config.train.gradient_release else None,
            )
        else:
            check_pipeline(config, contributions)
            self.store, self.pipeline = self._make_pipeline(placement)
            self.monitors.pipeline = self.pipeline
        self.parts = make_fp8_parts(self.built, recorder=self.monitors.recorder)
        self.scales = self.parts.scales
        self.sharding = self._connect(owners)
        self.optimizer = make_run_optimizer(
            config, self.built, processes, self.parts.resident, self.sharding, runs_on=runs_on
        )
        self._scale_events = self._watch_scales()
        self.recorded: RecordedStep | None = None
        if config.run.cuda_graphs:
            recorder = recorder or CudaGraphs(processes.device)
            self.recorded = RecordedStep(recorder, self._one_after_the_other, self._forget_casts)
            for weight in self.parts.resident.values():
                weight.cast_at_once()
        initialise(self.model, config.run.seed, self.optimizer.states.seed_master)
        self._publish()

    def _connect(self, owners: Partition | None) -> Sharding | None:
        """Connect the linears to what was made for them; what ZeRO owns is cut from the weights after."""
        if owners is None:
            connect_linears(self.built, self.parts, sink_slot=self.store.sink_slot)
            return None
        resident = self.parts.resident
        gather = make_gather(self.config, self.processes, self.built, owners, resident)
        connect_linears(self.built, self.parts, sink_slot=self.store.sink_slot, arrived=gather.wait)
        return Sharding(self.processes, self.built, owners, gather, resident)

    def _watch_scales(self) -> ScaleEvents | None:
        fp8, quant = self.built.fp8, self.config.precision.gemm.value()
        if fp8 is None or quant is None:
            return None
        delayed = [use for use, spec in quant.casts().items() if spec.scale_source == "delayed"]
        slots = [f"{path}/{use}" for path in fp8.converted for use in delayed]
        if not slots:
            return None
        return ScaleEvents(slots, self.scales, self.processes.pp, self.processes.device)

    def _make_pipeline(self, placement: StagePlacement) -> tuple[GradientStore, Pipeline]:
        store = GradientStore(
            self.model,
            self.gradients,
            group_of=placement.launch_group,
            uses=placement.uses(tied=self.config.model.tie_embeddings),
            defer=placement.schedule in ZERO_BUBBLE,
            parts=self.processes.tp,
            whole=self._whole(),
        )
        pipeline = Pipeline(
            self.model,
            placement,
            self.processes.pp,
            store,
            parameters=list(self.outline.specs),
            fp8_traffic=self.config.precision.traffic.pipeline == "fp8",
            device=self.processes.device,
        )
        return store, pipeline

    def _publish(self) -> None:
        """Make the model's weights those of the masters."""
        self.optimizer.publish()
        self._distribute()

    def _distribute(self) -> None:
        if self.sharding is not None:  # compiled blocks and graphs do not wait within
            compiled = any(block.compiled for block in self.model.held_blocks())
            self.sharding.distribute(wait=compiled or self.recorded is not None)

    def _whole(self) -> list[str]:
        """Parameters that every tensor-parallel rank holds whole."""
        return [fqn for fqn, spec in self.model.specs.items() if spec.shard is None]

    def step(self, step: int, micro_batches: Tensor) -> StepResult:
        """Run optimizer step ``step`` (0-based): forward, backward, reduction, clipping, update, new weights.

        Args:
            step: position in the schedule.
            micro_batches: this rank's int64 [A, B, S+1], on the CPU.
        """
        self.monitors.before_step(step + 1)
        # This rank's tokens of its micro-batches, on the device: int64 [A, B, S/cp] each.
        inputs, targets = inputs_and_targets(micro_batches, self.ignore_after)
        inputs, targets = (self._part(t) for t in (inputs, targets))
        # Every rank divides by the target tokens of the global batch: the sum over ranks is the gradient.
        num_targets = self._global_token_count(targets)
        num_tokens = num_targets if isinstance(num_targets, int) else num_targets.clamp(min=1)
        # Forward and backward of all micro-batches into the store, which reduces each bucket once it is full.
        # ``scale`` is the parametrisation's factor on the loss (1 in the standard one), and on its gradients:
        # divided out below where that restores the true ones.
        scale = self.model.parametrization.gradient_scale
        factor = lr_factor(self.config.schedule, step, self.config.total_steps)
        if (released := self.store.released) is not None:
            released.worth = None if isinstance(num_targets, int) else num_targets > 0
            no_clipping = torch.ones((), dtype=torch.float64, device=self.processes.device)
            self.optimizer.begin(**self._next_update(factor, no_clipping))
        total = self._gradients(inputs, targets, num_tokens if scale == 1.0 else num_tokens / scale)
        # For the log: the loss summed over all tokens, one FP64 number.
        self.processes.replicas.all_reduce(total, purpose="loss")()
        self.processes.pp.all_reduce(total, purpose="loss")()  # zero but on the last stage
        # Of reduced gradients, hence the same on all ranks, which so apply or skip the step together.
        norm = self._global_norm() * self._unscale
        # Here a step waits for the device, and reads all that it needs; later it would wait for the update.
        grad_norm, applied = norm_and_whether_applied(norm, num_targets)
        partly = False
        if released is not None:
            released.finish()  # the optimizer has the buckets that were left
            applied, partly = not released.stopped, released.stopped and released.handed_on > 0
        if self.scales is not None:  # first: new weights are cast with the next step's scales
            self.scales.advance(partial(all_reduce_max, self.processes.stage), applied=applied)
        clip = clip_multiplier(norm, self.config.optimizer.clip_grad_norm)
        if applied or partly:
            # Over the states that this rank keeps: reads the store's gradients chunk by chunk, times one
            # device scalar, and writes new weights into the model, or into its FP8 weights.
            if released is None:
                self.optimizer.step(self.store.reader, **self._next_update(factor, clip))
            else:
                self.optimizer.end()
            self.updates += 1
            self._distribute()  # ZeRO: owners send the new rows to everyone
        if applied:
            self.store.commit(clip)  # what the next reduction starts from: residuals, factors, grids
        self.store.release()  # ZeRO: the sums that owners received
        no_targets = not applied and not num_targets > 0
        loss = total * torch.nan if no_targets else total / num_tokens
        return StepResult(loss, grad_norm, self.config.optimizer.lr * factor, applied, no_targets, partly)

    def _next_update(self, lr_factor: float, clip: Tensor) -> dict[str, Any]:
        """What the optimizer is told of the next update, whose gradients are multiplied by ``clip``."""
        return {
            "step": self.updates + 1,
            "lr_factor": lr_factor,
            "grad_multiplier": clip * self._unscale,
            "count_flushed": self.monitors.sampled,
        }

    def _update_released(self, grad: Callable[[str], GradientReader], fqns: Sequence[str]) -> None:
        """Update the parameters of a bucket while backward goes on."""
        self.optimizer.update(grad, fqns)

    def _gradients(self, inputs: Tensor, targets: Tensor, num_tokens: Tensor | float) -> Tensor:
        """Forward and backward of all micro-batches into the store, reduced; again where the gradients'
        scales turn out not to fit. Returns this rank's summed loss, an FP64 scalar. Gradients are those of
        the loss over ``num_tokens``."""
        with nullcontext() if self.scales is None else self.scales.recording():
            total = self._accumulate(inputs, targets, num_tokens)
            while self.store.must_repeat():
                total = self._accumulate(inputs, targets, num_tokens)
        return total

    def _global_norm(self) -> Tensor:
        """Norm of the gradients of effective weights, the same on all ranks: FP64 scalar, no host sync."""
        if self._norm_weights is None:
            return self.store.global_norm() if self.pipeline is None else self.pipeline.global_norm()
        norms = self.store.norms(list(self.outline.specs))
        self.processes.pp.all_reduce(norms, purpose="norm")()  # zero but on the rank that holds it
        return torch.linalg.vector_norm(norms * self._norm_weights)

    def _accumulate(self, inputs: Tensor, targets: Tensor, num_tokens: Tensor | float) -> Tensor:
        # Each parameter now expects a contribution per micro-batch.
        self.store.begin_step(len(inputs), launch=self.recorded is None)
        if self.recorded is not None:
            total, replayed = self.recorded(self.monitors.kind, inputs, targets, num_tokens)
            if replayed:
                self.store.replayed()
                self._forget_casts()  # an evaluation's, of the weights before: the graph has its own
            self.store.finish()
        elif self.pipeline is None:
            total = self._one_after_the_other(inputs, targets, num_tokens)
            self.store.finish()  # waits for the last bucket's reduction
        else:
            total = self.pipeline.run(inputs, targets, num_tokens)
            self.store.finish()
            self.pipeline.add_tied_gradients()
        return total

    def _forget_casts(self) -> None:
        for linear in self.model.linears().values():
            linear.forget_casts()
        if self.model.fp8_head is not None:
            self.model.fp8_head.forget()

    def _one_after_the_other(self, inputs: Tensor, targets: Tensor, num_tokens: Tensor | float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for x, y in zip(inputs, targets, strict=True):
            loss_sum = self.model(x, y)  # FP32 scalar: nats summed over this rank's tokens
            (loss_sum / num_tokens).backward()
            total += loss_sum.detach()
        return total

    @torch.no_grad()
    def summed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward only, with the training numerics: int64 [A, B, S] each, on the device. Returns nats as an
        FP64 scalar; zero on ranks without the last pipeline stage."""
        if self.pipeline is not None:
            return self.pipeline.evaluate(inputs, targets)
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for x, y in zip(inputs, targets, strict=True):
            total += self.model(x, y)
        return total

    def _part(self, tokens: Tensor) -> Tensor:
        """This rank's tokens of each sequence, on its device."""
        context = self.model.context
        return (tokens if context is None else context.part(tokens)).to(
            self.processes.device, non_blocking=True
        )

    def _global_token_count(self, targets: Tensor) -> Tensor | int:
        """Target tokens of the whole global batch; known without communication unless some are left out, and
        then an FP64 scalar, perhaps zero."""
        if self.ignore_after is None and self.config.data.kind == "pretrain":
            return targets.numel() * self.processes.replicas.size
        count = (targets != IGNORE).sum().double()
        self.processes.replicas.all_reduce(count, purpose="loss")()
        return count

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint: master weights, moments and scale state. The model's own weights are
        the masters' rounding."""
        return self.optimizer.states.tensors() | self.scale_tensors()

    def scale_tensors(self) -> dict[str, Tensor]:
        """The scale state among :meth:`state_tensors`: that of gradients and that of delayed scales."""
        scales = {} if self.scales is None else self.scales.state_tensors()
        return {**self.gradients.scales.state_tensors(), **scales}

    def checkpoint_tensors(self) -> dict[str, Tensor | LogicalTensor]:
        """:meth:`state_tensors`, with the place of those that are parts of a logical tensor."""
        parts = {
            name: LogicalTensor(tensor, shape, offset)
            for name, (tensor, shape, offset) in self.optimizer.states.logical_tensors().items()
            if tuple(tensor.shape) != shape
        }
        return {**self.state_tensors(), **parts}

    def rank_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint that belong to this rank alone; usually none."""
        return self.gradients.rank_tensors()

    def state_meta(self) -> dict[str, Any]:
        """Host state for a checkpoint, as JSON values."""
        return {
            "updates": self.updates,
            **self.monitors.state(),
            **self.optimizer.state_meta(),
            **self.gradients.state_meta(),
        }

    def check_meta(self, meta: dict[str, Any], accepted: Callable[[str], bool] = lambda key: False) -> None:
        """Check that training can go on from a checkpoint with this host state.

        Args:
            meta: the checkpoint's :meth:`state_meta`.
            accepted: settings that the user changes knowingly.

        Raises:
            ValueError: another update rule, or other settings that ``exact`` depends on.
        """
        self.check_rule(meta)
        self.gradients.check_meta(meta, accepted)

    def check_rule(self, meta: Mapping[str, Any]) -> None:
        """Check that a checkpoint's optimizer states are of this run's update rule.

        Raises:
            ValueError: another update rule.
        """
        try:
            self.optimizer.check_state_meta(meta)
        except ValueError as error:
            raise ValueError(f"optimizer.name: {error}") from None

    def restored(self, meta: Mapping[str, Any]) -> None:
        """Finish loading after :meth:`state_tensors` were filled in place. ``meta``: with ``updates``, which
        the moments have seen."""
        self.updates = meta["updates"]
        self.monitors.load_state(meta)
        if self._scale_events is not None:
            self._scale_events.forget()
        self._publish()

    def precision_metrics(self) -> dict[str, float]:
        """State of the reduction and of the guard for the log; waits for the device. Collective over the
        pipeline's ranks."""
        return self.gradients.scales.metrics(self.processes.pp) | self.monitors.guard_metrics()

    def new_scale_events(self) -> dict[str, dict[str, int]] | None:
        """Amaxes since the last call that gave no delayed scale, by slot; None without delayed scales. Waits
        for the device; collective over the pipeline's ranks."""
        return None if self._scale_events is None else self._scale_events.take()

    def sent_bytes(self) -> dict[str, int]:
        """Bytes this rank has sent since the start, by collective and purpose, over all axes."""
        return dict(self.gradients.sent_bytes(self.processes.groups.values()))
