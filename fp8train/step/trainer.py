"""One optimizer step, and what a checkpoint must hold to repeat it.

A step, for this rank's micro-batches: forward gives the summed loss, divided by the *global* number of target
tokens; backward fills the gradient store, which reduces while backward goes on; the norm of all gradients
gives one clip factor; the optimizer reads gradient and state and writes new weights. A step whose gradient is
not finite changes nothing, on all ranks together (the norm is of the reduced gradients, so all ranks see the
same one); nor does one without a single target token, which has no gradient, nor one that the watch over
spikes or FP8 skips (:mod:`fp8train.step.verdict`). A step that looks wrong may be run a second time before
that is decided (:mod:`fp8train.step.attribution`).

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

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.config.world import accumulation_steps, check_pipeline, check_release
from fp8train.kernels.package_kernels import RunsOn, on_cuda
from fp8train.models.build import build_model, initialise, outline
from fp8train.models.connect import connect_linears, make_fp8_parts
from fp8train.optim.clipping import clip_multiplier
from fp8train.optim.host_states import Offload
from fp8train.optim.schedule import lr_factor
from fp8train.parallel.gradients.held import GradientReader
from fp8train.parallel.gradients.store import GradientStore
from fp8train.parallel.pipeline import ZERO_BUBBLE, Pipeline, StagePlacement
from fp8train.parallel.stages import part_of, plan_stages
from fp8train.parallel.zero import Partition
from fp8train.step.assemble import all_reduce_max, make_gradient_buckets, make_run_optimizer, tensor_parallel
from fp8train.step.attribution import compare_runs, trace_non_finite, watched_outputs
from fp8train.step.base_trainer import BaseTrainer
from fp8train.step.measured import Measured
from fp8train.step.recorded import CudaGraphs, RecordedStep, Recorder
from fp8train.step.rerun import StateBefore
from fp8train.step.result import Skipped, StepEvent, StepResult
from fp8train.step.sharding import Sharding, make_gather, make_partition
from fp8train.step.targets import inputs_and_targets
from fp8train.step.verdict import judge


def place_stages(config: Config, processes: Processes, vocab_size: int) -> StagePlacement | None:
    """Which pipeline rank holds which stage; None with one stage."""
    pp = processes.pp
    assert pp.size == config.parallel.pp, f"{pp.size} pipeline ranks, parallel.pp is {config.parallel.pp}"
    if pp.size == 1:
        return None
    stages = plan_stages(config, vocab_size)
    return StagePlacement(stages, config.parallel.pipeline.schedule, pp=pp.size, rank=pp.rank)


class Trainer(BaseTrainer):
    """Model, gradient store and optimizer of one process, all of it this package's.

    Attributes:
        pipeline: None with one stage.
        gradients: how gradients are stored and reduced, and the scale state of that.
        store: gradients.
        sharding: this rank's share of the optimizer; None without ZeRO.
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
        offload: Offload | None = None,
    ) -> None:
        """Build everything and fill in the values of step 0. ``recorder``: in place of CUDA's, where
        ``run.cuda_graphs`` asks for one; ``runs_on``: where the kernels of other packages run; ``offload``:
        in place of the device's, where ``optimizer.offload`` does."""
        placement = place_stages(config, processes, vocab_size)
        built = build_model(
            config,
            vocab_size=vocab_size,
            device=processes.device,
            part=None if placement is None else part_of(placement.held),
            parallel=tensor_parallel(config, processes),
            context=None if processes.cp.size == 1 else ContextParallel(processes.cp),
            runs_on=runs_on,
        )
        in_parts = placement is not None or processes.tp.size > 1
        whole = outline(config, vocab_size) if in_parts else built.model
        super().__init__(config, processes, built, whole, ignore_after=ignore_after)
        contributions = accumulation_steps(config, processes.dp.size)
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
                watched=self._keeps_own_sums,
            )
        else:
            check_pipeline(config, contributions)
            self.store, self.pipeline = self._make_pipeline(placement)
            self.monitors.pipeline = self.pipeline
        self.parts = make_fp8_parts(self.built, recorder=self.monitors.recorder)
        self.scales = self.monitors.scales = self.parts.scales
        self.sharding = self._connect(owners)
        self.optimizer = make_run_optimizer(
            config, self.built, processes, self.parts.resident, self.sharding, offload, runs_on=runs_on
        )
        self._scale_events = self._watch_scales()
        self.recorded: RecordedStep | None = None
        if config.run.cuda_graphs:
            recorder = recorder or CudaGraphs(processes.device)
            self.recorded = RecordedStep(recorder, self._one_after_the_other, self._forget_casts)
        if config.run.cuda_graphs or self.optimizer.states.in_host_memory:  # later the master is elsewhere
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

    def _make_pipeline(self, placement: StagePlacement) -> tuple[GradientStore, Pipeline]:
        store = GradientStore(
            self.model,
            self.gradients,
            group_of=placement.launch_group,
            uses=placement.uses(tied=self.config.model.tie_embeddings),
            defer=placement.schedule in ZERO_BUBBLE,
            parts=self.processes.tp,
            whole=self._whole(),
            watched=self._keeps_own_sums,
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

    @property
    def _keeps_own_sums(self) -> bool:
        """Whether somebody may ask what this rank contributed to the gradients."""
        return self.processes.world_size > 1 or self.config.spikes.rerun

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
        factor = lr_factor(self.config.schedule, step, self.config.total_steps)
        if (released := self.store.released) is not None:
            released.worth = None if isinstance(num_targets, int) else num_targets > 0
            no_clipping = torch.ones((), dtype=torch.float64, device=self.processes.device)
            self.optimizer.begin(**self._next_update(factor, no_clipping))
        # Here a step waits for the device, and reads all that it needs; later it would wait for the update.
        seen, events = self._measure_surely(step + 1, inputs, targets, num_targets)
        verdict = judge(
            self.monitors,
            step + 1,
            loss=seen.loss,
            grad_norm=seen.grad_norm,
            num_targets=seen.num_targets,
            late=released is not None,
        )
        skipped, partly = verdict.skipped, False
        if released is not None:
            released.finish()  # the optimizer has the buckets that were left
            skipped = (skipped or "not_finite") if released.stopped else ""
            partly = released.stopped and released.handed_on > 0
        if skipped == "not_finite":
            events = (*events, self._trace(inputs, targets, seen))
        self._update(seen.norm, factor, skipped, partly=partly)
        loss = seen.total * torch.nan if skipped == "no_targets" else seen.total / max(seen.num_targets, 1)
        lr = self.config.optimizer.lr * factor
        events = (*events, *verdict.events)
        return StepResult(loss, seen.grad_norm, lr, skipped, partly, events, verdict.rewind)

    def _update(self, norm: Tensor, lr_factor: float, skipped: Skipped, *, partly: bool) -> None:
        """Move on to new weights and scales, or stay where the step began."""
        self.progress.enter("optimizer")
        if self.scales is not None:  # first: new weights are cast with the next step's scales
            self.scales.advance(partial(all_reduce_max, self.processes.stage), applied=not skipped)
        clip = clip_multiplier(norm, self.config.optimizer.clip_grad_norm)
        if not skipped or partly:
            # Over the states that this rank keeps: reads the store's gradients chunk by chunk, times one
            # device scalar, and writes new weights into the model, or into its FP8 weights.
            if self.store.released is None:
                self.optimizer.step(self.store.reader, **self._next_update(lr_factor, clip))
            else:
                self.optimizer.end()
            self.updates += 1
            self._distribute()  # ZeRO: owners send the new rows to everyone
        if not skipped:
            self.store.commit(clip)  # what the next reduction starts from: residuals, factors, grids
        self.store.release()  # ZeRO: the sums that owners received

    def _measure(self, inputs: Tensor, targets: Tensor, num_targets: Tensor | int) -> Measured:
        """Forward, backward and reduction of all micro-batches, and their numbers on the host."""
        num_tokens = num_targets if isinstance(num_targets, int) else num_targets.clamp(min=1)
        # ``scale`` is the parametrisation's factor on the loss (1 in the standard one), and on its gradients:
        # divided out below where that restores the true ones.
        scale = self.model.parametrization.gradient_scale
        own = self._gradients(inputs, targets, num_tokens if scale == 1.0 else num_tokens / scale)
        # The loss summed over all tokens, one FP64 number.
        total = own.clone()
        self.processes.replicas.all_reduce(total, purpose="loss")()
        self.processes.pp.all_reduce(total, purpose="loss")()  # zero but on the last stage
        # Of reduced gradients, hence the same on all ranks, which so apply or skip the step together.
        return Measured.read(total, self._global_norm() * self._unscale, num_targets, own)

    def _measure_surely(
        self, done: int, inputs: Tensor, targets: Tensor, num_targets: Tensor | int
    ) -> tuple[Measured, tuple[StepEvent, ...]]:
        """:meth:`_measure`; with ``spikes.rerun`` twice where the result looks wrong, and then the second one
        with what the comparison says."""
        if not self.config.spikes.rerun:
            return self._measure(inputs, targets, num_targets), ()
        before = StateBefore(self.gradients.scales.state_tensors(), self.processes.device)
        seen = self._measure(inputs, targets, num_targets)
        own = self.store.own_sums() if self.monitors.suspects(done, seen) else {}
        if not own:
            return seen, ()
        before.restore()
        again = self._measure(inputs, targets, num_targets)
        return again, (compare_runs(self.processes, done, (seen, again), (own, self.store.own_sums())),)

    def _trace(self, inputs: Tensor, targets: Tensor, seen: Measured) -> StepEvent:
        """Where a step that is not finite began to be so; before the gradients are gone."""

        def first_module() -> str | None:
            if self.config.train.compile != "off":  # hooks would be compiled, too
                return None
            with watched_outputs(self.model) as names:
                self.summed_loss(inputs, targets)
            return names[0] if names else None

        return trace_non_finite(
            self.processes,
            seen,
            self.store.own_norms(),
            self.store.own_sums(),
            order=list(self.outline.specs),
            first_module=first_module,
        )

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
        self.progress.enter("forward")
        if self.recorded is not None:
            total, replayed = self.recorded(self.monitors.kind, inputs, targets, num_tokens)
            if replayed:
                self.store.replayed()
                self._forget_casts()  # an evaluation's, of the weights before: the graph has its own
            self._finish_reduction()
        elif self.pipeline is None:
            total = self._one_after_the_other(inputs, targets, num_tokens)
            self._finish_reduction()
        else:
            total = self.pipeline.run(inputs, targets, num_tokens)
            self._finish_reduction()
            self.pipeline.add_tied_gradients()
        return total

    def _finish_reduction(self) -> None:
        self.progress.enter("reduce")
        self.store.finish()  # waits for the last bucket

    def _one_after_the_other(self, inputs: Tensor, targets: Tensor, num_tokens: Tensor | float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for x, y in zip(inputs, targets, strict=True):
            self.progress.enter("forward")
            loss_sum = self.model(x, y)  # FP32 scalar: nats summed over this rank's tokens
            self.progress.enter("backward")
            (loss_sum / num_tokens).backward()
            total += loss_sum.detach()
        return total

    @torch.no_grad()
    def summed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run forward only; a pipeline in its own schedule."""
        if self.pipeline is not None:
            return self.pipeline.evaluate(inputs, targets)
        return super().summed_loss(inputs, targets)

    @property
    def keeps_residuals(self) -> bool:
        """Whether gradients leave residuals of error feedback; never on a stage without a linear in FP8."""
        return self.gradients.fp8 is not None and self.gradients.fp8.error_feedback

    def scale_tensors(self) -> dict[str, Tensor]:
        """The scale state of gradients, and that of delayed scales."""
        return {**self.gradients.scales.state_tensors(), **super().scale_tensors()}

    def rank_tensors(self) -> dict[str, Tensor]:
        """Residuals of error feedback, where gradients leave any."""
        return self.gradients.rank_tensors()

    def state_meta(self) -> dict[str, Any]:
        """Host state for a checkpoint, as JSON values."""
        return {**super().state_meta(), **self.gradients.state_meta()}

    def check_meta(self, meta: dict[str, Any], accepted: Callable[[str], bool] = lambda key: False) -> None:
        """Check rule and settings that ``exact`` depends on."""
        super().check_meta(meta, accepted)
        self.gradients.check_meta(meta, accepted)

    def restored(self, meta: Mapping[str, Any]) -> None:
        """Finish loading after :meth:`state_tensors` were filled in place. ``meta``: with ``updates``, which
        the moments have seen."""
        self.updates = meta["updates"]
        self.monitors.load_state(meta)
        if self._scale_events is not None:
            self._scale_events.forget()
        self._publish()

    def precision_metrics(self) -> dict[str, float]:
        """State of the reduction and of the guard for the log."""
        return self.gradients.scales.metrics(self.processes.pp) | super().precision_metrics()

    def sent_bytes(self) -> dict[str, int]:
        """Bytes this rank has sent since the start, by collective and purpose, over all axes."""
        return dict(self.gradients.sent_bytes(self.processes.groups.values()))
