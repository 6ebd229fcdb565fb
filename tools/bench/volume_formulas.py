"""Bytes that a rank sends in one optimizer step, by formula.

Counted as :mod:`fp8train.comm.collectives` counts: per rank and direction. What ends in n bytes on N ranks
costs ``n·(N-1)/N`` as an all-gather, all-to-all or reduce-scatter and twice that as an all-reduce. Notation:

* M micro-batches a step, L blocks on the rank, T = B·S/cp tokens of a micro-batch on a tensor-parallel group;
* H width of the model, K and N inputs and outputs of a linear, e bytes of the compute type;
* ``blocks(r, w)``: r rows of w FP8 codes with a scale byte for each block of b, ``r·ceil(w/b)·(b+1)``;
* R = dp·cp replicas, whose gradients of the same parameters add up.

Left out: what is small (amaxes, norms, the loss, scales of whole tensors), padding (parts of a ZeRO message
are as long as the longest, messages of blocks are filled up to equal parts; ``zero_partition: whole_tensor``
on many ranks pads a lot), steps that ``exact`` runs twice (its first, and at jumps), evaluation and
checkpoints.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fp8train.comm.processes import AXES
from fp8train.config.errors import ConfigError
from fp8train.config.schema import Config
from fp8train.config.world import accumulation_steps, check_pipeline
from fp8train.models.build import outline
from fp8train.models.part import ModelPart
from fp8train.models.shapes import held, local_shape, split_dim
from fp8train.parallel.pipeline import TIED, StagePlacement
from fp8train.parallel.stages import part_of, plan_stages
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import MAX_BLOCK, block_size, scale_tile

_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


class Flow(NamedTuple):
    """One kind of traffic: over which ranks, by which collective, for what.

    Attributes:
        axis: of the ranks that exchange it, such as ``tp``; several are joined, as in ``dp+cp``.
        name: ``collective/purpose``, as in the byte counters.
    """

    axis: str
    name: str


Volume = Mapping[Flow, float]
"""Bytes of a step that one rank sends."""


def _nothing() -> defaultdict[Flow, float]:
    return defaultdict(float)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model.

    Attributes:
        fqn: its name.
        shape: of the logical tensor.
        in_fp8_plan: the linear it belongs to multiplies in FP8.
    """

    fqn: str
    shape: tuple[int, ...]
    in_fp8_plan: bool

    def local(self, tp: int) -> tuple[int, int]:
        """(rows, row length) of a tensor-parallel rank's part; a vector is one row."""
        shape = local_shape(self.fqn, self.shape, tp)
        return math.prod(shape[:-1]), shape[-1]

    def elements(self, tp: int) -> int:
        """Number of elements of a tensor-parallel rank's part."""
        return math.prod(self.local(tp))


@dataclass(frozen=True)
class RankStep:
    """One optimizer step on one rank: what the formulas need to know.

    Attributes:
        config: a validated configuration.
        dp: data-parallel ranks.
        micro_batches: M.
        parameters: of the whole model.
        placement: of the pipeline, seen from this rank; None with one stage.
    """

    config: Config
    dp: int
    micro_batches: int
    parameters: tuple[Parameter, ...]
    placement: StagePlacement | None = None

    @property
    def tp(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.config.parallel.tp

    @property
    def replicas(self) -> int:
        """Number of replicas R, whose gradients of the same parameters add up."""
        return self.dp * self.config.parallel.cp

    @property
    def zero(self) -> bool:
        """Whether the replicas share the optimizer states."""
        return self.config.parallel.zero == 1 and self.replicas > 1

    @property
    def itemsize(self) -> int:
        """Bytes e of an element in the compute type."""
        return _BYTES[self.config.precision.compute]

    @property
    def tokens(self) -> int:
        """Tokens T of a micro-batch on a tensor-parallel group."""
        config = self.config
        return config.train.micro_batch_size * config.data.seq_length // config.parallel.cp

    @property
    def part(self) -> ModelPart:
        """The part of the model that the rank holds."""
        if self.placement is None:
            return ModelPart.whole(self.config.model.num_layers)
        return part_of(self.placement.held)

    def held(self) -> list[Parameter]:
        """Parameters of the rank's part of the model, a copy of a tied embedding included."""
        part, tied = self.part, self.config.model.tie_embeddings
        return [parameter for parameter in self.parameters if held(parameter.fqn, part, tied=tied)]

    def axis(self, *axes: str) -> str:
        """The name of these axes together; those of one rank do not count."""
        sizes = {**dict(self.config.parallel), "dp": self.dp}
        return "+".join(axis for axis in AXES if axis in axes and sizes[axis] > 1)


def scattered(nbytes: float, ranks: int) -> float:
    """Bytes that an all-gather, all-to-all or reduce-scatter of ``nbytes`` in all sends: ``n·(N-1)/N``."""
    return nbytes * (ranks - 1) / ranks


def all_reduced(nbytes: float, ranks: int) -> float:
    """Bytes that an all-reduce of ``nbytes`` sends: ``2·n·(N-1)/N``."""
    return 2 * scattered(nbytes, ranks)


def in_blocks(rows: int, width: int, block: int) -> int:
    """Bytes of FP8 codes with block scales: ``rows·ceil(width/block)·(block+1)``."""
    return rows * -(-width // block) * (block + 1)


Casts = Sequence[tuple[QuantSpec, int]]
"""Of operands whose codes are gathered: how, and the dimension that their GEMM contracts."""


def scale_bytes(spec: QuantSpec, contracted: int, tokens: int, width: int) -> int:
    """Bytes of an operand's scales that travel with its codes [tokens, width]: those that differ from token
    to token."""
    rows, columns = scale_tile(spec.granularity, contracted)
    if rows is None:
        return 0
    return 4 * -(-tokens // rows) * (1 if columns is None else -(-width // columns))


def tensor_parallel(step: RankStep) -> Volume:
    """Traffic of the hidden linears, each M times::

        tp_input        column-parallel  all-gather  2·T·K·e  input, forward and again backward
        tp_grad_input   column-parallel  all-to-all  T·K·e    or blocks(T, K)
        tp_output       row-parallel     all-to-all  T·N·e    or blocks(T, N)
        tp_grad_output  row-parallel     all-gather  T·N·e

    times ``(tp-1)/tp``; e is 1 for gathers of linears that multiply in FP8 where ``precision.traffic`` says
    fp8. ``activation_checkpointing: full`` runs forward again: a third gather of the input, a second scatter
    of the output; ``selective`` runs no linear again. Two ways to quantise one output gradient are two
    gathers. Scales of rows and blocks travel with the codes, 4 bytes each.
    """
    traffic, quant = step.config.precision.traffic, step.config.precision.gemm.value() or LinearQuant()
    forwards = 2 if step.config.train.activation_checkpointing == "full" else 1
    x_casts = [(quant.output_x, 1)] * (1 + forwards)
    if quant.keep_x in ("second_copy", "bf16"):
        x_casts[-1] = quant.grad_weight_x, 0
    grad_casts = [(quant.grad_input_grad_output, 1)]
    if not quant.shares_grad_output:
        grad_casts.append((quant.grad_weight_grad_output, 0))
    tokens, found = step.tokens, _nothing()

    def add(name: str, times: int, width: int, *, fp8: bool, casts: Casts = (), blocks: bool = False) -> None:
        block = block_size(width, MAX_BLOCK)
        codes = in_blocks(tokens, width, block) if blocks else tokens * width
        nbytes = times * (codes if fp8 else tokens * width * step.itemsize)
        if fp8:
            nbytes += sum(scale_bytes(spec, dim, tokens, width) for spec, dim in casts)
        found[Flow("tp", name)] += step.micro_batches * scattered(nbytes, step.tp)

    for parameter in step.held():
        if not parameter.fqn.startswith("layers.") or len(parameter.shape) != 2:
            continue
        plan, (outputs, inputs) = parameter.in_fp8_plan, parameter.shape
        if split_dim(parameter.fqn) == 0:
            fp8 = plan and traffic.activations == "fp8"
            add("all_gather/tp_input", len(x_casts), inputs, fp8=fp8, casts=x_casts)
            fp8 = plan and traffic.grad_input == "fp8"
            add("all_to_all/tp_grad_input", 1, inputs, fp8=fp8, blocks=True)
        else:
            fp8 = plan and traffic.output == "fp8"
            add("all_to_all/tp_output", forwards, outputs, fp8=fp8, blocks=True)
            fp8 = plan and traffic.grad_output == "fp8"
            times = len(grad_casts) if fp8 else 1
            add("all_gather/tp_grad_output", times, outputs, fp8=fp8, casts=grad_casts)
    return found


def embedding_and_head(step: RankStep) -> Volume:
    """Traffic of embedding and head over tensor-parallel ranks, where the model begins and ends, always in
    the compute type::

        tp_embedding  all-to-all M·T·H·e states, all-gather M·T·H·e their gradient
        tp_head       all-gather M·T·H·e states, all-to-all M·T·H·e their gradient,
                      all-reduce M·T·3·4: maximum, sum and target's score of each token in FP32

    times ``(tp-1)/tp`` (the all-reduce twice).
    """
    states = step.micro_batches * step.tokens * step.config.model.hidden_size * step.itemsize
    scalars = step.micro_batches * step.tokens * 3 * max(4, step.itemsize)
    moved, found = scattered(states, step.tp), _nothing()
    if step.part.begins:
        found[Flow("tp", "all_to_all/tp_embedding")] += moved
        found[Flow("tp", "all_gather/tp_embedding")] += moved
    if step.part.ends:
        found[Flow("tp", "all_gather/tp_head")] += moved
        found[Flow("tp", "all_to_all/tp_head")] += moved
        found[Flow("tp", "all_reduce/tp_head")] += all_reduced(scalars, step.tp)
    return found


def context_parallel(step: RankStep) -> Volume:
    """Attention trades tokens for heads. With h query and g key/value heads of D: queries, keys and values
    (h + 2·g) there, outputs (h) back, and their gradients likewise::

        cp_attention  all-to-all  M·L·T·D·e/tp · (2·(2·h + 2·g) + again) · (cp-1)/cp

    ``again`` is what recomputing repeats: everything (2·h + 2·g) with ``full``; h + 2·g with ``selective``,
    which stops when it has what the attention kernel had saved.
    """
    model = step.config.model
    there, back = model.num_heads + 2 * model.num_kv_heads, model.num_heads
    again = {"none": 0, "selective": there, "full": there + back}
    heads = 2 * (there + back) + again[step.config.train.activation_checkpointing]
    of_head = step.tokens * model.head_dim * step.itemsize / step.tp
    total = step.micro_batches * len(step.part.layers) * heads * of_head
    return {Flow("cp", "all_to_all/cp_attention"): scattered(total, step.config.parallel.cp)}


def pipeline(step: RankStep) -> Volume:
    """Traffic between stages on different ranks, for each such edge::

        pipeline_states     send  M·(T/tp)·H·e  or M·blocks(T/tp, H), filled up to 4 bytes
        pipeline_gradients  send  the same, the other way
        tied_gradient       send  V/tp·H·e, between the two copies of a tied embedding of V (padded) rows

    with e of ``gradient.accumulate`` for the last. Under ZeRO that is V/tp·H/R, with e of
    ``gradient.reduce``.
    """
    placement, found = step.placement, _nothing()
    if placement is None:
        return found
    rows, width = step.tokens // step.tp, step.config.model.hidden_size
    message = rows * width * step.itemsize
    if step.config.precision.traffic.pipeline == "fp8":
        message = -(-in_blocks(rows, width, block_size(width, MAX_BLOCK)) // 4) * 4
    for stage in placement.held:
        here = placement.rank_of[stage.index]
        for other, name in ((stage.index + 1, "pipeline_states"), (stage.index - 1, "pipeline_gradients")):
            if placement.rank_of.get(other, here) != here:
                found[Flow("pp", f"send/{name}")] += step.micro_batches * message
    ends = {placement.first_rank, placement.last_rank}
    if step.config.model.tie_embeddings and len(ends) == 2 and (step.part.begins or step.part.ends):
        table = next(p for p in step.parameters if p.fqn == TIED).elements(step.tp)
        gradient = step.config.precision.gradient
        nbytes = table * _wide(step, gradient.accumulate)
        if step.zero:
            nbytes = table * _wide(step, gradient.reduce) // step.replicas
        found[Flow("pp", "send/tied_gradient")] += nbytes
    return found


def _wide(step: RankStep, setting: str) -> int:
    """Bytes of a high-precision gradient: FP64 runs have FP64 gradients."""
    return 8 if step.config.precision.compute == "fp64" else _BYTES[setting]


def gradients(step: RankStep) -> Volume:
    """Traffic of gradients over the replicas, n elements on the rank, e bytes of ``gradient.reduce``::

        gradient           all-reduce      2·n·e·(R-1)/R    everything outside the FP8 plan
                           reduce-scatter  n·e·(R-1)/R      under ZeRO
        gradient, partial  all-reduce      2·n·e·(G-1)/G    norms, positions and biases of row-parallel
                                                            linears, over G = dp·cp·tp, if tp > 1

    and those of the FP8 plan (:func:`fp8_plan_gradients`), if there are any. ``exact`` sends the others as
    INT64.
    """
    gradient, axis = step.config.precision.gradient, step.axis("dp", "cp")
    in_fp8 = gradient.format != "high_precision"
    found = _nothing()
    found.update(fp8_plan_gradients(step) if in_fp8 else {})
    others = [parameter for parameter in step.held() if not (in_fp8 and parameter.in_fp8_plan)]
    elements = {True: 0, False: 0}  # by whether they are partial sums over tensor-parallel ranks too
    for parameter in others:
        elements[step.tp > 1 and split_dim(parameter.fqn) is None] += parameter.elements(step.tp)
    nbytes = _wide(step, gradient.reduce)
    stage = step.axis("dp", "cp", "tp")
    if in_fp8 and gradient.fp8.reduce == "exact":
        name, sent = ("reduce_scatter", scattered) if step.zero else ("all_reduce", all_reduced)
        found[Flow(axis, f"{name}/gradient_exact")] += sent(8 * elements[False], step.replicas)
        both = all_reduced(8 * elements[True], step.replicas * step.tp)
        found[Flow(stage, "all_reduce/gradient_exact")] += both
        return found
    if step.zero:
        found[Flow(axis, "reduce_scatter/gradient")] += scattered(nbytes * elements[False], step.replicas)
    else:
        found[Flow(axis, "all_reduce/gradient")] += all_reduced(nbytes * elements[False], step.replicas)
    found[Flow(stage, "all_reduce/gradient")] += all_reduced(nbytes * elements[True], step.replicas * step.tp)
    return found


def fp8_plan_gradients(step: RankStep) -> Volume:
    """Traffic of FP8 gradients of n elements, by ``gradient.fp8.reduce``::

        exchange      all-to-all and all-gather, each blocks·(R-1)/R; under ZeRO the all-to-all alone
        bf16, fp32    all-reduce 2·n·e·(R-1)/R; under ZeRO a reduce-scatter, n·e·(R-1)/R
        shared_scale  all-reduce of bytes, 2·n·(R-1)/R
        exact         codes, then INT32 sums, (1 + 4)·n·(R-1)/R; with several micro-batches an all-reduce of
                      INT32, 2·4·n·(R-1)/R
                      (both, under ZeRO: a reduce-scatter, the first half of this)

    ``exchange`` in two levels, X nodes of S ranks: ``(S-1)/S`` of the blocks each way inside, and of 1/S of
    them ``(X-1)/X`` each way between (``between_nodes: bf16``: 2 bytes an element on the way there); under
    ZeRO the way there alone.
    """
    fp8, ranks, found = step.config.precision.gradient.fp8, step.replicas, _nothing()
    plan = [parameter for parameter in step.held() if parameter.in_fp8_plan]
    elements = sum(parameter.elements(step.tp) for parameter in plan)
    blocks = [(*p.local(step.tp), block_size(p.shape[-1], fp8.block)) for p in plan]

    def add(name: str, nbytes: float) -> None:
        found[Flow(step.axis("dp", "cp"), name)] += nbytes

    if fp8.reduce == "exchange":
        nbytes = sum(in_blocks(*sizes) for sizes in blocks)
        if fp8.node_size not in (None, ranks):
            _two_levels(step, nbytes, elements, add)
            return found
        add("all_to_all/gradient_fp8_plan", scattered(nbytes, ranks))
        if not step.zero:
            add("all_gather/gradient_fp8_plan", scattered(nbytes, ranks))
    elif fp8.reduce == "shared_scale" and step.zero:
        add("reduce_scatter/gradient_fp8_plan", scattered(elements, ranks))
    elif fp8.reduce == "shared_scale":
        add("all_reduce/gradient_fp8_plan", all_reduced(elements, ranks))
    elif fp8.reduce == "exact" and step.micro_batches == 1:
        add("all_to_all/gradient_exact", scattered(elements, ranks))
        if not step.zero:
            add("all_gather/gradient_exact", scattered(4 * elements, ranks))
    elif fp8.reduce == "exact" and step.zero:
        add("reduce_scatter/gradient_exact", scattered(4 * elements, ranks))
    elif fp8.reduce == "exact":
        add("all_reduce/gradient_exact", all_reduced(4 * elements, ranks))
    elif step.zero:
        add("reduce_scatter/gradient_fp8_plan", scattered(elements * _BYTES[fp8.reduce], ranks))
    else:
        stored = sum(rows * -(-width // block) * block for rows, width, block in blocks)
        add("all_reduce/gradient_fp8_plan", all_reduced(stored * _BYTES[fp8.reduce], ranks))
    return found


def _two_levels(step: RankStep, nbytes: int, elements: int, add: Callable[[str, float], None]) -> None:
    """The hierarchical exchange; see :func:`fp8_plan_gradients`."""
    fp8 = step.config.precision.gradient.fp8
    assert fp8.node_size is not None
    size, nodes = fp8.node_size, step.replicas // fp8.node_size
    add("all_to_all/gradient_fp8_plan_in_node", scattered(nbytes, size))
    sent = (nbytes if fp8.between_nodes == "fp8" else 2 * elements) / size
    add("all_to_all/gradient_fp8_plan_between_nodes", scattered(sent, nodes))
    if not step.zero:
        add("all_gather/gradient_fp8_plan_in_node", scattered(nbytes, size))
        add("all_gather/gradient_fp8_plan_between_nodes", scattered(nbytes / size, nodes))


def weights(step: RankStep) -> Volume:
    """Traffic of new weights under ZeRO, from their owners to the replicas, n elements on the rank::

        weights_fp8_plan  all-gather  n·(R-1)/R    FP8-resident weights, as codes
        weights           all-gather  n·e·(R-1)/R  all others

    FP8-resident weights take 2 bytes where ``traffic.weights`` is compute, and twice with
    ``keep_w: second_copy``.
    """
    found, precision = _nothing(), step.config.precision
    if not step.zero:
        return found
    copies = 2 if precision.gemm.keep_w == "second_copy" else 1
    of_code = copies * (1 if precision.traffic.weights == "fp8" else 2)
    for parameter in step.held():
        resident = parameter.in_fp8_plan and precision.weights == "fp8"
        name = "all_gather/weights_fp8_plan" if resident else "all_gather/weights"
        nbytes = parameter.elements(step.tp) * (of_code if resident else step.itemsize)
        found[Flow(step.axis("dp", "cp"), name)] += scattered(nbytes, step.replicas)
    return found


def volume(step: RankStep) -> dict[Flow, float]:
    """Everything that the rank sends in a step, without what is zero."""
    total = _nothing()
    for formula in (tensor_parallel, embedding_and_head, context_parallel, pipeline, gradients, weights):
        for flow, nbytes in formula(step).items():
            total[flow] += nbytes
    return {flow: nbytes for flow, nbytes in total.items() if nbytes}


def _parameters(config: Config, vocab_size: int) -> tuple[Parameter, ...]:
    """Names and shapes of the whole model, from an outline without storage."""
    specs = outline(config, vocab_size).specs
    return tuple(Parameter(fqn, spec.global_shape, spec.in_fp8_plan) for fqn, spec in specs.items())


def rank_steps(config: Config, *, dp: int) -> list[RankStep]:
    """One step as each pipeline rank sees it (ranks along other axes send the same). What only the start of a
    run refuses is not checked here.

    Args:
        config: a validated configuration with ``model.vocab_size``.
        dp: data-parallel ranks.

    Raises:
        ConfigError: no vocabulary size, or a batch that these ranks cannot share.
    """
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        raise ConfigError("model.vocab_size is not set; without the tokenizer it must be: model.vocab_size=N")
    micro_batches = accumulation_steps(config, dp)
    check_pipeline(config, micro_batches)
    alone = RankStep(config, dp, micro_batches, _parameters(config, vocab_size))
    pp, schedule = config.parallel.pp, config.parallel.pipeline.schedule
    if pp == 1:
        return [alone]
    stages = plan_stages(config, vocab_size)
    return [
        replace(alone, placement=StagePlacement(stages, schedule, pp=pp, rank=rank)) for rank in range(pp)
    ]


def most_loaded(volumes: list[dict[Flow, float]]) -> int:
    """The pipeline rank that sends most in all; the first of equals."""
    return max(range(len(volumes)), key=lambda rank: sum(volumes[rank].values()))
