"""Which gradients are stored and reduced how: the choice behind the gradient store.

Weights of linears that multiply in FP8 may have FP8 gradients; everything else (embedding, head, norms,
biases, linears outside the plan) keeps high precision. Whether a tensor is quantised is decided by its name
in the plan, never by the part of it that a rank happens to hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.auto_scale import PAPER_WINDOW, Criterion, MuController, Start, initial_mu
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import Exchange, HierarchicalExchange
from fp8train.comm.fp8_all_reduce import Algorithm
from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.blocks import MAX_BLOCK, block_size
from fp8train.numerics.formats import E4M3, Format
from fp8train.parallel.buckets import Bucket, GradientRecorder, Member, PlainBucket
from fp8train.parallel.exact import ExactBucket, ExactFixedPointBucket, ExactFp8Bucket, GridScales
from fp8train.parallel.fp8_buckets import BlockReduction, Fp8Bucket, WideReducedFp8Bucket
from fp8train.parallel.shared_scale_bucket import SharedScaleBucket, SharedState
from fp8train.parallel.zero import Partition
from fp8train.parallel.zero_buckets import OwnedFp8Bucket, OwnedPlainBucket

PURPOSE = "gradient_fp8_plan"
"""Name of FP8-plan gradients in the byte counters; the others are ``gradient``."""


@dataclass(frozen=True)
class Fp8Gradients:
    """How gradients of the FP8 plan are kept.

    Attributes:
        format: of the codes.
        accumulate: dtype in which micro-batches add up.
        reduce: the sum over ranks; a dtype reduces in it.
        block: most elements that share a scale.
        error_feedback: carry what the cast lost into the next step.
        between_nodes: type between nodes of a hierarchical exchange.
        algorithm: who adds in ``shared_scale``.
        mu_criterion: what halves its auto-scaling factor.
        mu_threshold: share of entries at the maximum, for criterion ``count``.
        mu_window: quiet steps that double it.
        mu_initial: where it starts.
    """

    format: Format = E4M3
    accumulate: torch.dtype = torch.bfloat16
    reduce: Literal["exchange", "shared_scale", "exact"] | torch.dtype = "exchange"
    block: int = MAX_BLOCK
    error_feedback: bool = False
    between_nodes: Literal["fp8", "bf16"] = "fp8"
    algorithm: Algorithm = "ring"
    mu_criterion: Criterion = "count"
    mu_threshold: float | None = None
    mu_window: int = PAPER_WINDOW
    mu_initial: Start = "one_over_ranks"


@dataclass(frozen=True)
class Groups:
    """The data-parallel ranks: all of them, and for a hierarchical exchange in two levels.

    Attributes:
        all: every data-parallel rank.
        local: those of this node; None for a flat exchange.
        cross: those of all nodes with this one's place in its node.
        partial: all of them and the tensor-parallel ranks, over which gradients of parameters add up that are
            applied to parts of sequences; None without tensor parallelism.
    """

    all: CountedGroup
    local: CountedGroup | None = None
    cross: CountedGroup | None = None
    partial: CountedGroup | None = None


class GradientPlan:
    """Makes the buckets of a gradient store (a :class:`~fp8train.parallel.gradient_store.BucketMaker`) and
    keeps what they share between steps: grids of ``exact``, auto-scaling factors of ``shared_scale``.

    Attributes:
        fp8: how FP8 gradients are kept; None if none are.
        mu: auto-scaling factors; None but for ``shared_scale``.
        grids: None but for ``exact``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        accumulate: torch.dtype,
        reduce: torch.dtype,
        bucket_bytes: float,
        groups: Groups,
        device: torch.device,
        fp8: Fp8Gradients | None = None,
        agree: CountedGroup | None = None,
        in_fp8_plan: Collection[str] = (),
        contributions: int = 0,
        recorder: GradientRecorder | None = None,
        unchanged: Mapping[str, int | str | None] | None = None,
        specs: Mapping[str, ParamSpec] | None = None,
        owners: Partition | None = None,
    ) -> None:
        """Decide.

        Args:
            parameters: everything that will have a gradient; for ``exact`` of the whole model, whatever part
                a rank holds.
            accumulate: dtype of high-precision buffers.
            reduce: their dtype on the wire.
            bucket_bytes: size of a bucket in the accumulation dtype, approximately.
            groups: data-parallel ranks.
            device: where buffers live.
            fp8: how FP8 gradients are kept; None stores all in high precision.
            agree: ranks whose gradients determine the grids of ``exact``; by default the data-parallel ones.
            in_fp8_plan: names whose gradients are FP8.
            contributions: micro-batches of a step; with one, FP8 gradients need no accumulator.
            recorder: takes statistics of casts to FP8.
            unchanged: settings that a checkpoint must have been written with, by key: those that the bits of
                ``exact`` depend on.
            specs: of the parameters, where this rank holds parts of them.
            owners: under ZeRO, who of ``groups.all`` needs which rows of the sum.
        """
        self.owners = owners
        self._specs = specs or {}
        self._accumulate, self._reduce, self._bucket_bytes = accumulate, reduce, bucket_bytes
        self._groups, self._device, self.fp8 = groups, device, fp8
        self._in_fp8_plan = frozenset(in_fp8_plan) if fp8 is not None else frozenset()
        self._contributions, self._recorder = contributions, recorder
        self._unchanged = dict(unchanged or {})
        self._with_residual: list[Fp8Bucket] = []
        self.mu: MuController | None = None
        self.grids: GridScales | None = None
        # Positions in the shared state: FP8 parameters for mu, all for the grids.
        self._position: dict[str, int] = {}
        if fp8 is not None and fp8.reduce == "shared_scale":
            self._shared_scales(parameters, fp8)
        elif fp8 is not None and fp8.reduce == "exact":
            self._position = {fqn: i for i, fqn in enumerate(parameters)}
            self.grids = GridScales(
                [fqn in self._in_fp8_plan for fqn in parameters],
                [parameter.numel() for parameter in parameters.values()],
                micro_batches=contributions * groups.all.size,
                group=groups.all if agree is None else agree,
                device=device,
            )

    def _shared_scales(self, parameters: Mapping[str, Tensor], fp8: Fp8Gradients) -> None:
        names = [fqn for fqn in parameters if fqn in self._in_fp8_plan]
        self._position = {fqn: i for i, fqn in enumerate(names)}
        self.mu = MuController(
            names,
            world_size=self._groups.all.size,
            device=self._device,
            initial=initial_mu(fp8.mu_initial, self._groups.all.size),
            criterion=fp8.mu_criterion,
            threshold=fp8.mu_threshold,
            window=fp8.mu_window,
        )
        sizes = [parameters[fqn].numel() for fqn in names]
        self._numel = torch.tensor(sizes, dtype=torch.int64, device=self._device)
        self.saturated = torch.zeros(len(names), dtype=torch.int64, device=self._device)

    def kind(self, fqn: str, shape: tuple[int, ...]) -> str:
        """``plain``, ``partial`` (plain, and to be added over tensor-parallel ranks too), ``fp8``, or
        ``fp8/BLOCK`` (a bucket has one block size)."""
        spec = self._specs.get(fqn)
        if fqn not in self._in_fp8_plan:
            return "partial" if spec is not None and spec.sequence_partial else "plain"
        assert self.fp8 is not None
        if self.fp8.reduce in ("shared_scale", "exact"):
            return "fp8"
        row = shape[-1] if spec is None else spec.global_shape[-1]
        return f"fp8/{block_size(row, self.fp8.block)}"

    def capacity(self, kind: str) -> int:
        """Elements of a bucket."""
        dtype = self._accumulate
        if kind.startswith("fp8"):
            assert self.fp8 is not None
            dtype = self.fp8.accumulate
        return max(1, int(self._bucket_bytes / dtype.itemsize))

    def make(self, kind: str, members: Sequence[Member]) -> Bucket:
        """A bucket of these members."""
        if self.grids is not None:
            return self._exact(kind, members)
        if kind == "plain" and self.owners is not None:
            return OwnedPlainBucket(
                members,
                accumulate=self._accumulate,
                reduce=self._reduce,
                plan=self.owners,
                group=self._groups.all,
                device=self._device,
            )
        if not kind.startswith("fp8"):
            return PlainBucket(
                members,
                accumulate=self._accumulate,
                reduce=self._reduce,
                group=self._groups.all if kind == "plain" else self._groups.partial or self._groups.all,
                device=self._device,
            )
        assert self.fp8 is not None
        if self.mu is not None:
            positions = [self._position[member.fqn] for member in members]
            return SharedScaleBucket(
                members,
                fmt=self.fp8.format,
                accumulate=self.fp8.accumulate,
                state=SharedState(self.mu.mu, self.saturated, torch.tensor(positions, device=self._device)),
                group=self._groups.all,
                algorithm=self.fp8.algorithm,
                purpose=PURPOSE,
                recorder=self._recorder,
                device=self._device,
            )
        return self._blocks(int(kind.partition("/")[2]), members, self.fp8)

    def _exact(self, kind: str, members: Sequence[Member]) -> ExactBucket:
        assert self.grids is not None
        bucket = ExactFixedPointBucket if kind == "plain" else ExactFp8Bucket
        return bucket(
            members,
            scales=self.grids,
            parameters=[self._position[member.fqn] for member in members],
            group=self._groups.all,
            contributions=self._contributions,
            recorder=self._recorder,
            device=self._device,
        )

    def _owned_blocks(
        self, block: int, members: Sequence[Member], fp8: Fp8Gradients, owners: Partition
    ) -> Bucket:
        """Under ZeRO. What travels wide is not cast at all: its owner reads the sum."""
        if isinstance(fp8.reduce, torch.dtype):
            return OwnedPlainBucket(
                members,
                accumulate=fp8.accumulate,
                reduce=fp8.reduce,
                plan=owners,
                group=self._groups.all,
                purpose=PURPOSE,
                device=self._device,
            )
        bucket = OwnedFp8Bucket(
            members,
            block=block,
            fmt=fp8.format,
            accumulate=None if self._contributions == 1 else fp8.accumulate,
            plan=owners,
            group=self._groups.all,
            purpose=PURPOSE,
            error_feedback=fp8.error_feedback,
            recorder=self._recorder,
            device=self._device,
        )
        self._with_residual += [bucket] if fp8.error_feedback else []
        return bucket

    def _blocks(self, block: int, members: Sequence[Member], fp8: Fp8Gradients) -> Bucket:
        if self.owners is not None:
            return self._owned_blocks(block, members, fp8, self.owners)
        if isinstance(fp8.reduce, torch.dtype):
            return WideReducedFp8Bucket(
                members,
                block=block,
                fmt=fp8.format,
                accumulate=fp8.accumulate,
                reduce=fp8.reduce,
                group=self._groups.all,
                recorder=self._recorder,
                device=self._device,
            )
        bucket = Fp8Bucket(
            members,
            block=block,
            fmt=fp8.format,
            accumulate=None if self._contributions == 1 else fp8.accumulate,
            reduction=self._reduction(fp8),
            parts=self._groups.all.size,
            error_feedback=fp8.error_feedback,
            recorder=self._recorder,
            device=self._device,
        )
        self._with_residual += [bucket] if fp8.error_feedback else []
        return bucket

    def _reduction(self, fp8: Fp8Gradients) -> BlockReduction | None:
        if self._groups.all.size == 1:
            return None
        if self._groups.local is None or self._groups.cross is None:
            return Exchange(self._groups.all, fp8.format, purpose=PURPOSE)
        return HierarchicalExchange(
            self._groups.local,
            self._groups.cross,
            fp8.format,
            between=fp8.between_nodes,
            purpose=PURPOSE,
        )

    @property
    def norm_is_exact(self) -> bool:
        """Whether the norm must not depend on buckets, ranks or device; see
        :meth:`~fp8train.parallel.gradient_store.GradientStore.global_norm`."""
        return self.grids is not None

    @property
    def replicas(self) -> CountedGroup:
        """The ranks that reduce."""
        return self._groups.all

    @property
    def needs_calibration(self) -> bool:
        """Whether the step's batch must first be run for its amax alone; see :meth:`calibration`."""
        return self.grids is not None and not self.grids.calibrated

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Gradients that arrive in here only show their amax; the grids follow from it at the end."""
        assert self.grids is not None
        self.grids.calibrating = True
        try:
            yield
        finally:
            self.grids.calibrating = False
        self.grids.commit()

    def begin_step(self) -> None:
        """Micro-batches of a step are about to arrive."""
        if self.grids is not None:
            self.grids.begin_step()

    def end_step(self) -> None:
        """The step's gradients are reduced: agree on what the ranks saw."""
        if self.grids is not None:
            self.grids.agree()

    def commit(self) -> None:
        """The optimizer step was applied: scale state moves (and only now)."""
        if self.mu is not None:
            self.mu.update(self.saturated, self._numel)
        if self.grids is not None:
            self.grids.commit()

    def state_tensors(self) -> dict[str, Tensor]:
        """Scale state for checkpoints, equal on all ranks."""
        states = (self.mu, self.grids)
        return {name: t for state in states if state is not None for name, t in state.state_tensors().items()}

    def rank_tensors(self) -> dict[str, Tensor]:
        """What this rank alone knows: residuals of error feedback."""
        return {
            f"gradient_residual/{i}": bucket.residual
            for i, bucket in enumerate(self._with_residual)
            if bucket.residual is not None
        }

    def state_meta(self) -> dict[str, Any]:
        """Which reduction the scale state belongs to, and the settings that must not change."""
        return {"reduction": self._reduction_name(), "unchanged": self._unchanged}

    def _reduction_name(self) -> str:
        return "exact" if self.grids is not None else "shared_scale" if self.mu is not None else "stateless"

    def check_meta(
        self, meta: Mapping[str, Any], accepted: Callable[[str], bool] = lambda key: False
    ) -> None:
        """Whether a checkpoint with this host state keeps the promise of ``exact``, if it was ``exact`` too.

        Args:
            meta: the checkpoint's :meth:`state_meta`.
            accepted: keys that the user changes knowingly.

        Raises:
            ValueError: a setting that the bits depend on has another value.
        """
        ours, saved = self._reduction_name(), meta.get("reduction", "stateless")
        saved_settings = meta.get("unchanged", {}) if ours == saved else self._unchanged
        changed = [
            f"{key}={saved_settings.get(key, 'unknown')} (now {value})"
            for key, value in self._unchanged.items()
            if saved_settings.get(key, "unknown") != value and not accepted(key)
        ]
        if changed:
            raise ValueError(
                f"precision.gradient.fp8.reduce: {ours} gives the same bits only if what they depend on "
                f"stays; restore {', '.join(changed)}; the number of ranks may change. To go on with other "
                "bits, name them in checkpoint.accept_changes"
            )

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """``fp8/...`` numbers about gradients; waits for the device. ``stages``: ranks with the other
        parameters of the model."""
        found: dict[str, float] = {}
        if self.mu is not None:
            nothing = self.mu.mu.new_full((1,), -torch.inf)
            extremes = torch.stack([torch.cat((nothing, sign * self.mu.mu)).max() for sign in (-1, 1)])
            shares = torch.stack((self.saturated.sum(), self._numel.sum()))
            stages.all_reduce(extremes, purpose="statistics", op=dist.ReduceOp.MAX)()
            stages.all_reduce(shares, purpose="statistics")()
            found["fp8/mu_min"], found["fp8/mu_max"] = -float(extremes[0]), float(extremes[1])
            found["fp8/gradient_saturated"] = float(shares[0] / shares[1])
        if self.grids is not None:
            found["fp8/gradient_saturated_elements"] = float(self.grids.saturated)
        return found

    def sent_bytes(self, others: Iterable[CountedGroup] = ()) -> Counter[str]:
        """Bytes this rank has sent since the start, by collective and purpose.

        Args:
            others: groups to count too; one that gradients use is not counted twice.
        """
        ours = (self._groups.all, self._groups.local, self._groups.cross, self._groups.partial)
        groups = {id(group): group for group in (*ours, *others) if group is not None}
        total: Counter[str] = Counter()
        for group in groups.values():
            total.update(group.sent)
        return total

    def restored(self) -> None:
        """:meth:`state_tensors` were filled from a checkpoint."""
        if self.grids is not None:
            self.grids.restored()
