"""The gradient store: where weight gradients live between backward and the optimizer.

Each parameter owns a slot of a flat buffer; slots are grouped into buckets in the order in which backward
produces them. Micro-batches add up in the buffer (the first one overwrites, nothing is zeroed). The store
knows how many contributions a parameter gets per step: when the last one of a bucket is in, the bucket is
reduced over the data-parallel ranks while backward goes on. Buckets are launched in index order on every
rank, whatever order they filled in, so collectives match. Too many or too few contributions is an error that
names the parameter.

Two entrances: linears of ours contribute through their sink (:mod:`fp8train.layers.linear`); parameters that
autograd serves (embedding, norms, biases, head) through a post-accumulate hook, which moves ``.grad`` out at
once. A tied weight fires that hook once per backward, after autograd has added its uses. ``.grad`` is None
after each.

The sum over ranks is the gradient of the global batch because every rank divides its loss by the global token
count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fp8train.comm.collectives import CountedGroup
from fp8train.layers.linear import Linear, SinkSlot
from fp8train.numerics.grad_sink import register_sink


@dataclass
class _Slot:
    fqn: str
    bucket: int
    view: Tensor
    count: int = 0


@dataclass
class _Bucket:
    flat: Tensor
    slots: list[int] = field(default_factory=list)
    pending: int = 0
    wire: Tensor | None = None
    wait: Callable[[], None] | None = None


class GradientStore:
    """Accumulates, reduces and serves the gradients of a model.

    Attributes:
        num_buckets: how many pieces the reduction travels in.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        accumulate: torch.dtype,
        reduce: torch.dtype,
        bucket_bytes: float,
        group: CountedGroup,
    ) -> None:
        """Attach to ``model``: linears get a sink slot, other parameters a hook.

        Args:
            model: every parameter that requires a gradient is served.
            accumulate: dtype of the buffers.
            reduce: dtype on the wire.
            bucket_bytes: size of a bucket in the accumulation dtype, approximately.
            group: data-parallel ranks.
        """
        self._reduce, self._group = reduce, group
        self._expected = 0
        self._slots: list[_Slot] = []
        self._buckets: list[_Bucket] = []
        self._index: dict[str, int] = {}
        self._next_launch = 0
        self._sink = register_sink(self)
        parameters = {fqn: p for fqn, p in reversed(list(model.named_parameters())) if p.requires_grad}
        self._allocate(parameters, accumulate, bucket_bytes)
        self._attach(model, parameters)

    def _allocate(
        self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, bucket_bytes: float
    ) -> None:
        limit = max(1, int(bucket_bytes / dtype.itemsize))
        groups: list[list[tuple[str, nn.Parameter]]] = [[]]
        filled = 0
        for fqn, parameter in parameters.items():
            if filled and filled + parameter.numel() > limit:
                groups.append([])
                filled = 0
            groups[-1].append((fqn, parameter))
            filled += parameter.numel()
        for number, members in enumerate(groups):
            size = sum(p.numel() for _, p in members)
            bucket = _Bucket(torch.zeros(size, dtype=dtype, device=members[0][1].device))
            offset = 0
            for fqn, parameter in members:
                view = bucket.flat[offset : offset + parameter.numel()].view(parameter.shape)
                offset += parameter.numel()
                self._index[fqn] = len(self._slots)
                bucket.slots.append(len(self._slots))
                self._slots.append(_Slot(fqn, number, view))
            self._buckets.append(bucket)

    def _attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        through_sink = set()
        for path, module in model.named_modules():
            fqn = f"{path}.weight"
            if isinstance(module, Linear) and fqn in parameters:
                slot = self._index[fqn]
                module.sink_slot = SinkSlot(self._sink, torch.tensor(slot), self._slots[slot].view)
                through_sink.add(fqn)
        for fqn, parameter in parameters.items():
            if fqn not in through_sink:
                parameter.register_post_accumulate_grad_hook(self._hook(self._index[fqn]))

    def _hook(self, slot: int) -> Callable[[Tensor], None]:
        def drain(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            self.contribute(slot, lambda: gradient)

        return drain

    @property
    def num_buckets(self) -> int:
        """How many pieces the reduction travels in."""
        return len(self._buckets)

    def begin_step(self, contributions: int) -> None:
        """Expect this many contributions (micro-batches) to every parameter; forgets an unfinished step."""
        self._expected, self._next_launch = contributions, 0
        for slot in self._slots:
            slot.count = 0
        for bucket in self._buckets:
            bucket.pending = len(bucket.slots)
            bucket.wait = bucket.wire = None

    @torch.no_grad()
    def contribute(self, slot: int, compute: Callable[[], Tensor]) -> None:
        """Add one micro-batch's gradient of the parameter in ``slot``; see
        :class:`~fp8train.numerics.grad_sink.GradSink`.

        Raises:
            RuntimeError: more contributions than the step expects.
        """
        entry = self._slots[slot]
        if entry.count >= self._expected:
            raise RuntimeError(
                f"gradient of {entry.fqn}: contribution {entry.count + 1} "
                f"in a step that expects {self._expected}"
            )
        gradient = compute()
        if entry.count == 0:
            entry.view.copy_(gradient)
        else:
            entry.view.add_(gradient)
        entry.count += 1
        if entry.count == self._expected:
            self._buckets[entry.bucket].pending -= 1
            self._launch_ready()

    def _launch_ready(self) -> None:
        while self._next_launch < len(self._buckets) and self._buckets[self._next_launch].pending == 0:
            bucket = self._buckets[self._next_launch]
            bucket.wire = bucket.flat if bucket.flat.dtype == self._reduce else bucket.flat.to(self._reduce)
            bucket.wait = self._group.all_reduce(bucket.wire, purpose="gradient")
            self._next_launch += 1

    def finish(self) -> None:
        """Wait until every bucket is reduced.

        Raises:
            RuntimeError: a parameter got fewer contributions than expected.
        """
        missing = [slot for slot in self._slots if slot.count != self._expected]
        if missing:
            listed = ", ".join(f"{slot.fqn} ({slot.count} of {self._expected})" for slot in missing[:4])
            raise RuntimeError(f"{len(missing)} parameters lack gradient contributions: {listed}")
        for bucket in self._buckets:
            assert bucket.wait is not None and bucket.wire is not None
            bucket.wait()
            if bucket.wire is not bucket.flat:
                bucket.flat.copy_(bucket.wire)
            bucket.wire = bucket.wait = None

    def grad(self, fqn: str) -> Tensor:
        """The parameter's gradient: local sum before :meth:`finish`, global after. Shape of the parameter,
        accumulation dtype."""
        return self._slots[self._index[fqn]].view

    def global_norm(self) -> Tensor:
        """Euclidean norm over all parameters: FP64 scalar on the device, no host sync. Sums run in slot
        order."""
        on_cpu = self._buckets[0].flat.device.type == "cpu"
        wide = torch.float64 if on_cpu or self._buckets[0].flat.dtype == torch.float64 else torch.float32
        norms = [torch.linalg.vector_norm(slot.view, dtype=wide) for slot in self._slots]
        return torch.linalg.vector_norm(torch.stack(norms).double())
