"""Pipeline parallelism: a step of this rank's stages under a schedule of ``torch.distributed.pipelining``.

This is the only file that knows that library. It is used like this:

* A stage is a function of the rank's :class:`~fp8train.models.decoder.Decoder`, which keeps its parameters
  under their names; the module that torch wants has none.
* Shapes are told, never inferred: inference runs a phantom micro-batch that pollutes gradients and
  statistics. Stages are built anew when shapes change.
* The last stage's loss divides by the *global* token count, so torch scales no gradient.
* Zero-bubble schedules split backward: linears' weight gradients are deferred by the gradient store, and the
  runner that ``dw_builder`` hands to torch computes them: at once in a full backward, else in the W phase.
  What autograd serves (norms, biases, embedding) is in with grad_input. The other schedules have no W phase,
  and defer nothing, which keeps no operands and lets blocks be compiled.

**Reduction.** In every schedule a rank's later stage finishes its weight gradients before an earlier one, so
the buckets of later stages are launched first, in the same order on all data-parallel ranks. A stage's
reduction overlaps with the backward of the stages before it.

**Tied embeddings.** First and last stage hold a copy each. After the data-parallel reduction the two ranks
swap their gradients and add them in one order (first + last) in the accumulation dtype: equal gradients and
equal states keep the copies bit-identical. With ``zbv`` both stages are on one rank, which holds one copy
with two contributions per micro-batch. The norm counts the first stage's.

**Norm.** Norms of all parameters, in one order of names, are summed over the stages as one FP64 vector in
which every entry but the owner's is zero: exact, hence the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp8train.comm.calls import GroupCalls
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.stage_wire import StageWire
from fp8train.models.decoder import Decoder
from fp8train.parallel.gradients.store import GradientStore
from fp8train.parallel.stages import Stage, stages_of_rank

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")
TIED = "embedding.weight"
_SWAP_ELEMENTS = 1 << 24  # of a tied gradient that travel at once
_STATES = "states of other stages"

_CLASSES = {
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}


class _StageModule(nn.Module):
    """A module for torch around a function; parameters stay where they are."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        """Tokens int64 [B, S] or states [B, S, H] -> states."""
        return self._run(x)


def _watched_stage(calls: GroupCalls) -> type[PipelineStage]:
    """torch's stage, which says when it computes: all else in a schedule is waiting for other stages."""
    from torch.distributed.pipelining import PipelineStage  # takes a second to import: for those who need it

    class WatchedStage(PipelineStage):
        def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
            with calls.not_waiting():
                return super().forward_one_chunk(*args, **kwargs)

        def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
            with calls.not_waiting():
                return super().backward_one_chunk(*args, **kwargs)

        def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
            with calls.not_waiting():
                return super().backward_weight_one_chunk(*args, **kwargs)

    return WatchedStage


class StagePlacement:
    """Which pipeline rank holds which stages.

    Attributes:
        stages: all, first to last.
        held: those of this rank, ascending.
        rank_of: pipeline rank of each stage.
    """

    def __init__(self, stages: Sequence[Stage], schedule: str, *, pp: int, rank: int) -> None:
        self.stages, self.schedule, self._rank = list(stages), schedule, rank
        holders = [
            stages_of_rank(schedule, pp=pp, per_rank=len(stages) // pp, rank=other) for other in range(pp)
        ]
        self.rank_of = {index: other for other, held in enumerate(holders) for index in held}
        self.held = [stages[index] for index in holders[rank]]

    def is_here(self, index: int) -> bool:
        """Whether this rank holds a stage (False for one that does not exist)."""
        return self.rank_of.get(index) == self._rank

    @property
    def first_rank(self) -> int:
        """Pipeline rank of the first stage."""
        return self.rank_of[0]

    @property
    def last_rank(self) -> int:
        """Pipeline rank of the last stage."""
        return self.rank_of[len(self.stages) - 1]

    def launch_group(self, fqn: str) -> int:
        """When this rank's gradient of a parameter is complete: 0 for those of its last stage."""
        order = list(reversed(self.held))
        owners = [i for i, stage in enumerate(order) if stage.owns(fqn)]
        return owners[0] if owners else 0  # none: the last stage's copy of a tied embedding

    def uses(self, *, tied: bool) -> dict[str, int]:
        """Contributions per micro-batch of parameters that stages of this rank share."""
        both = self.is_here(0) and self.is_here(len(self.stages) - 1)
        return {TIED: 2} if tied and both else {}

    def describe(self) -> str:
        """``1f1b, 2 stages of 3 and 2 blocks``."""
        blocks = ", ".join(str(len(stage.layers)) for stage in self.stages)
        return f"{self.schedule}, {len(self.stages)} stages of {blocks} blocks"


class Pipeline:
    """Runs the stages that this rank holds, under the schedule's order.

    Attributes:
        placement: who holds what.
    """

    def __init__(
        self,
        decoder: Decoder,
        placement: StagePlacement,
        group: CountedGroup,
        store: GradientStore,
        *,
        parameters: Sequence[str],
        fp8_traffic: bool,
        device: torch.device,
    ) -> None:
        """Args:
        decoder: holds the parameters of this rank's stages.
        placement: who holds what.
        group: ranks with the other stages of the same samples.
        store: gradients; made with ``defer`` for :data:`ZERO_BUBBLE` schedules.
        parameters: names of all parameters of the whole model.
        fp8_traffic: send states and their gradients in FP8 where the next stage is on another rank.
        device: where states live.
        """
        self.placement = placement
        self._decoder, self._group, self._store, self._device = decoder, group, store, device
        self._names, self._fp8_traffic = sorted(parameters), fp8_traffic
        self._calls = group.calls.calls.group(f"{group.calls.name} schedule", group.calls.ranks)
        self._schedule: Any = None
        self._shape: torch.Size | None = None
        self._num_tokens: Tensor | float = 1
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._tied = decoder.config.tie_embeddings and placement.first_rank != placement.last_rank

    def run(self, inputs: Tensor, targets: Tensor, num_tokens: Tensor | float) -> Tensor:
        """Forward and backward of all micro-batches into the gradient store.

        Args:
            inputs: int64 [A, B, S], the same on all ranks of the pipeline.
            targets: int64 [A, B, S].
            num_tokens: of the global batch, over the gradient scale; divides the loss.

        Returns:
            Summed loss, FP64 scalar; zero where the last stage is not.
        """
        if self._shape != inputs.shape:  # first step, or a stage of a batch ramp
            self._schedule, self._shape = self._build(inputs.shape), inputs.shape
        self._num_tokens = num_tokens
        self._total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._decoder.prepare()  # FP8 copies of changed weights, once for all micro-batches
        # torch runs forward and backward of A micro-batches of B sequences in the schedule's order, and moves
        # states [B, S, H] forward and their gradients backward between ranks. Only the first stage reads
        # tokens, only the last one targets. Weight gradients go to the store, as without a pipeline.
        begins, ends = self.placement.held[0].begins, self.placement.held[-1].ends
        with self._calls.held(_STATES):
            self._schedule.step(
                *((inputs.flatten(0, 1),) if begins else ()),
                target=targets.flatten(0, 1) if ends else None,
                return_outputs=False,
            )
        self._count_traffic(inputs)
        return self._total

    def _build(self, shape: torch.Size) -> Any:
        """The schedule for inputs of this shape [A, B, S]."""
        from torch.distributed import pipelining  # takes a second to import: for those who need it

        num_micro_batches, batch, length = shape
        stages = [self._build_stage(stage, batch, length) for stage in self.placement.held]
        arguments: dict[str, Any] = {
            "n_microbatches": num_micro_batches,
            "loss_fn": self._loss,
            "scale_grads": False,
        }
        if self.placement.schedule == "1f1b":
            return pipelining.Schedule1F1B(stages[0], **arguments)
        return getattr(pipelining, _CLASSES[self.placement.schedule])(stages, **arguments)

    def _build_stage(self, stage: Stage, batch: int, length: int) -> PipelineStage:
        # On the meta device: only shapes are read. Inputs that require a gradient get one sent back.
        tokens = torch.empty(batch, length, dtype=torch.int64, device="meta")
        meta = torch.device("meta")
        return _watched_stage(self._calls)(
            _StageModule(self._function(stage, batch, length)),
            stage.index,
            stage.num_stages,
            self._device,
            input_args=tokens
            if stage.begins
            else self._message(stage.index - 1, batch, length, meta).requires_grad_(),
            output_args=self._message(stage.index, batch, length, meta).requires_grad_(),
            group=self._group.group,
            dw_builder=self._store.take_deferred if self.placement.schedule in ZERO_BUBBLE else None,
        )

    def _function(self, stage: Stage, batch: int, length: int) -> Callable[[Tensor], Tensor]:
        """What a stage computes: tokens or a message to a message or final states."""
        decoder = self._decoder
        before, after = (self._wire(edge, batch, length) for edge in (stage.index - 1, stage.index))

        def run(x: Tensor) -> Tensor:
            x = x if before is None else before.unpack(x)  # FP8 codes from another rank -> states
            x = decoder.embed(x) if stage.begins else x  # tokens [B, S] -> states [B, S, H]
            x = decoder.blocks(x, stage.layers, slice(0, length))
            x = decoder.final_norm(x) if stage.ends else x
            # States -> FP8 codes for another rank, 1 byte an element and 1 a block; or as they are.
            return x if after is None else after.pack(x)

        return run

    def _crosses(self, edge: int) -> bool:
        """Whether stage ``edge`` and the next one exist and are on two ranks."""
        both = edge in self.placement.rank_of and edge + 1 in self.placement.rank_of
        return both and self.placement.rank_of[edge] != self.placement.rank_of[edge + 1]

    def _wire(self, edge: int, batch: int, length: int) -> StageWire | None:
        """How states after stage ``edge`` travel; None as they are."""
        if not self._fp8_traffic or not self._crosses(edge):
            return None
        return StageWire(self._decoder.state_shape(batch, length), self._decoder.dtype)

    def _message(self, edge: int, batch: int, length: int, device: torch.device) -> Tensor:
        """Room for what stage ``edge`` hands on."""
        wire = self._wire(edge, batch, length)
        if wire is not None:
            return torch.empty(wire.carrier_shape, dtype=torch.float32, device=device)
        shape = self._decoder.state_shape(batch, length)
        return torch.empty(shape, dtype=self._decoder.dtype, device=device)

    def _loss(self, states: Tensor, targets: Tensor) -> Tensor:
        # Called by torch on the last stage, after each micro-batch's forward.
        loss_sum = self._decoder.loss(states, targets)
        self._total += loss_sum.detach()
        return loss_sum / self._num_tokens

    def _count_traffic(self, inputs: Tensor) -> None:
        """What torch sent: states to the next stage and gradients to the one before, if on other ranks."""
        meta, (_, batch, length) = torch.device("meta"), inputs.shape
        for stage in self.placement.held:
            for edge, purpose in ((stage.index, "pipeline_states"), (stage.index - 1, "pipeline_gradients")):
                if self._crosses(edge):
                    nbytes = self._message(edge, batch, length, meta).nbytes
                    self._group.count("send", purpose, len(inputs) * nbytes)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward of all micro-batches: summed loss, FP64 scalar; zero where the last stage is not.

        Stage after stage, each for all micro-batches. Where the next rank is also the one before (a loop of
        two), a stage sends only when it has received everything: neither waits for the other then.

        Args:
            inputs: int64 [A, B, S], the same on all ranks of the pipeline.
            targets: int64 [A, B, S].
        """
        self._decoder.prepare()
        with self._calls.held(_STATES):
            return self._evaluate(inputs, targets)

    def _evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        waits: list[Callable[[], None]] = []
        outputs: list[Tensor] = []
        for stage in self.placement.held:
            run = self._function(stage, *inputs.shape[1:])
            before, after = (self.placement.rank_of.get(stage.index + step) for step in (-1, 1))
            received, outputs = outputs, []
            for i, tokens in enumerate(inputs):
                x = self._input(stage, tokens, received[i : i + 1])
                with self._calls.not_waiting():
                    x = run(x)
                    if stage.ends:
                        total += self._decoder.loss(x, targets[i])
                        continue
                outputs.append(x)
                if self._crosses(stage.index) and after != before:
                    waits.append(self._send(x, stage))
            if self._crosses(stage.index) and after == before:
                waits += [self._send(x, stage) for x in outputs]
        for wait in waits:
            wait()
        return total

    def _input(self, stage: Stage, tokens: Tensor, local: Sequence[Tensor]) -> Tensor:
        """What a stage computes on: tokens, a stage's output on this rank, or one from another rank."""
        if stage.begins:
            return tokens
        if self.placement.is_here(stage.index - 1):
            return local[0]
        batch, length = tokens.shape
        message = self._message(stage.index - 1, batch, length, self._device)
        self._group.receive(message, self.placement.rank_of[stage.index - 1])
        return message

    def _send(self, message: Tensor, stage: Stage) -> Callable[[], None]:
        to = self.placement.rank_of[stage.index + 1]
        return self._group.send(message.contiguous(), to, purpose="pipeline_states")

    @torch.no_grad()
    def add_tied_gradients(self) -> None:
        """Give both copies of a tied embedding the sum of their gradients; after the data-parallel
        reduction."""
        first, last = self.placement.first_rank, self.placement.last_rank
        if not self._tied or self._group.rank not in (first, last):
            return
        is_first = self._group.rank == first
        # In pieces, in the accumulation dtype. Both ranks add first + last: their sums have equal bits.
        for ours in self._store.values(TIED).split(_SWAP_ELEMENTS):
            theirs = torch.empty_like(ours)
            self._group.swap(theirs, ours, last if is_first else first, purpose="tied_gradient")
            ours.copy_(ours + theirs if is_first else theirs + ours)

    def global_norm(self) -> Tensor:
        """Norm of the whole model's gradient: FP64 scalar, the same on all ranks."""
        # FP64 [parameters], zero for those of other stages; of two tied copies only the first counts.
        norms = self._store.norms(self._names)
        if self._tied and self._group.rank != self.placement.first_rank:
            norms[self._names.index(TIED)] = 0.0
        self._group.all_reduce(norms, purpose="norm")()
        return torch.linalg.vector_norm(norms)

    def combine_rows(self, rows: Tensor, held: Tensor) -> Tensor:
        """Rows of a table of the whole model, each from the rank that holds it.

        Args:
            rows: FP32 [N, F].
            held: bool [N], which of them are this rank's.
        """
        tables = rows.new_empty(self._group.size, *rows.shape)
        flags = torch.empty(self._group.size, len(held), dtype=torch.uint8, device=rows.device)
        self._group.all_gather(tables, rows, purpose="statistics")()
        self._group.all_gather(flags, held.to(torch.uint8), purpose="statistics")()
        return tables[flags.argmax(dim=0), torch.arange(len(held), device=rows.device)]
