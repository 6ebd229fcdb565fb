"""Calls of every fused operation at the shapes of one layer of Llama-3-8B with 8,192 tokens: what is compiled
without a GPU, and measured on one.

A case is made of tensors without values on the meta device, so it costs nothing; ``filled`` gives it memory.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fp8train.kernels
from fp8train.kernels.group_operands import GroupRule
from fp8train.kernels.operands import CastRule
from fp8train.kernels.optimizer_update import WIDE, optimizer_update
from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.block_scales import as_blocks, quantize_blocks
from fp8train.optim.optimizer import Optimizer
from fp8train.parallel.gradients.held import StoredGradient
from fp8train.precision.number_formats import E4M3, E5M2, FP16
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import Granularity
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamW, AdamWSettings
from fp8train.update_rules.lion import Lion
from fp8train.update_rules.rule import Rule, RuleSettings

for _module in pkgutil.iter_modules(fp8train.kernels.__path__):  # operations are declared when imported
    if not _module.ispkg:
        importlib.import_module(f"fp8train.kernels.{_module.name}")

TOKENS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 8192, 4096, 14336, 32, 8, 128, 128256
_FEW, _LONG = 64, 2**16  # rows that are not tokens; columns that are no model's width
X, GRADIENT = CastRule.of(QuantSpec(E4M3)), CastRule.of(QuantSpec(E5M2))


@dataclass(frozen=True)
class Case:
    """One call: an operation's name, what distinguishes the case, its arguments, and the largest number of
    those that count or index (int32, int64). ``remade`` makes the arguments on a device, from (device,
    scale), where more than their memory counts."""

    operation: str
    variant: str
    arguments: tuple[Any, ...]
    largest: int = 0
    remade: Callable[[torch.device, int], tuple[Any, ...]] | None = None

    def __str__(self) -> str:
        return f"{self.operation}[{self.variant}]"

    def filled(self, device: torch.device, *, scale: int = 1) -> tuple[Any, ...]:
        """The arguments in memory: floats of a normal distribution, bytes of few bits, integers that rise to
        the largest.

        Leading sizes of matrices are divided by ``scale``, and so is what else counts the same: statistics of
        rows, but no last dimension of a matrix, and no weight (BF16, one dimension). A few rows are those of
        ranks, segments or sequences: they stay, and where they are long they get shorter.
        """
        if self.remade is not None:
            return self.remade(device, scale)
        generator = torch.Generator(device).manual_seed(0)
        tensors = [x for x in self.arguments if isinstance(x, Tensor)]
        counted = {x.shape[0] for x in tensors if x.dim() > 1 and x.shape[0] >= _FEW}

        def shape_of(x: Tensor) -> list[int]:
            if x.dim() == 2 and x.shape[0] < _FEW and x.shape[1] >= _LONG:
                return [x.shape[0], x.shape[1] // scale]
            kept = 0 if x.dim() == 1 and x.dtype != torch.bfloat16 else 1
            cut = x.dim() - kept
            return [max(1, n // scale) if i < cut and n in counted else n for i, n in enumerate(x.shape)]

        def fill(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            # dimensions in the order in which they lie in memory
            order = sorted(range(x.dim()), key=lambda i: -x.stride(i))
            sizes = shape_of(x)
            shape = [sizes[i] for i in order]
            if x.dtype.is_floating_point and not shape:
                value = torch.full((), 4.0, dtype=x.dtype, device=device)  # a scale: a power of two
            elif x.dtype.is_floating_point and x.element_size() > 1:
                value = torch.randn(shape, generator=generator, device=device).to(x.dtype)
            elif x.dtype in (torch.int32, torch.int64):
                count = math.prod(shape)
                steps = torch.arange(1, count + 1, device=device)
                value = (steps * max(1, self.largest // scale) // count).to(x.dtype).view(shape)
            else:
                value = torch.randint(1, 120, shape, generator=generator, device=device, dtype=torch.uint8)
                value = value.view(x.dtype)
            return value.permute([order.index(i) for i in range(x.dim())])

        return tuple(fill(x) for x in self.arguments)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _operands() -> Iterator[Case]:
    x, partials = _empty(TOKENS, HIDDEN), _empty(1024, dtype=torch.float32)
    yield Case("amax_partials", "bf16", (x,))
    yield Case("cast_operand", "x", (x, partials, None, *X, True, True))
    yield Case("cast_operand", "grad_output", (x, partials, None, *GRADIENT, True, True))
    yield Case("turn_codes", "weight", (_empty(FFN, HIDDEN, dtype=torch.float8_e4m3fn),))
    delayed = _empty(dtype=torch.float32)
    yield Case("cast_operand", "x, delayed", (x, partials, delayed, *X, True, True))


def _updates() -> Iterator[Case]:
    """The optimizer step of a layer's matrices, and of what FP8 leaves alone."""
    sr = StateFormat("fp16_scaled", rounding="stochastic")
    o2 = StateFormats(sr, StateFormat("e4m3"), StateFormat("fp16_scaled"))
    small = StateFormats(sr, o2.exp_avg, StateFormat("e4m3", sqrt=True, rounding="stochastic"))
    adamw = AdamW(AdamWSettings(lr=3e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8))
    lion = Lion(RuleSettings(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.3))
    matrices = ((HIDDEN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
    for variant, rule, plan, shapes in (
        ("O2", adamw, o2, matrices),
        ("O1", adamw, StateFormats(sr), matrices),
        ("O2, sqrt of v in E4M3", adamw, small, matrices),
        ("O2, BF16 remainder", adamw, replace(o2, master=StateFormat("bf16_remainder")), matrices),
        ("O2, lion", lion, replace(o2, exp_avg_sq=None), matrices),
        ("O2, short blocks", adamw, o2, ((FFN, 257),)),
        ("FP32", adamw, StateFormats(), ((HIDDEN,), (FFN, HIDDEN))),
    ):
        remade = partial(_update, rule, plan, shapes)
        yield Case("optimizer_update", variant, remade(torch.device("meta"), 1), remade=remade)


def _stored_weights() -> Iterator[Case]:
    number, codes = _empty(dtype=torch.float32), _empty(FFN, HIDDEN, dtype=torch.float8_e4m3fn)
    blocks = _empty(FFN, HIDDEN // 128, dtype=torch.uint8)
    for name, payload, scale, bits in (
        ("FP16 blocks", _empty(FFN, HIDDEN, dtype=torch.float16), blocks, FP16.mantissa_bits),
        ("FP32", _empty(FFN, HIDDEN, dtype=torch.float32), None, WIDE),
    ):
        master, nothing = (payload, scale, bits, 128, number), codes.new_empty(0)
        one = Case("cast_stored", name, (codes, nothing, number, number, number, *master, None, 0, *X))
        remade = partial(_turned_too, one)
        arguments = remade(torch.device("meta"), 1)
        yield one
        yield Case("cast_stored", f"{name}, both layouts", arguments, remade=remade)


def _turned_too(case: Case, device: torch.device, scale: int) -> tuple[Any, ...]:
    """The arguments of a case of ``cast_stored``, which is to write transposed codes as well."""
    codes, _, *others = case.arguments if device.type == "meta" else case.filled(device, scale=scale)
    turned = torch.zeros(codes.shape[::-1], dtype=torch.uint8, device=device).view(codes.dtype)
    return codes, turned, *others


def _update(
    rule: Rule, plan: StateFormats, shapes: Sequence[tuple[int, ...]], device: torch.device, scale: int
) -> tuple[Any, ...]:
    """Arguments of one launch: BF16 weights, gradients in E4M3 blocks under a plan, else in FP32. Masters are
    normal with deviation 0.02, and moments those of one step with gradients of deviation 1e-4, as in
    training; on the meta device nothing has values."""
    seen: list[tuple[Any, ...]] = []

    def keep(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen.append(arguments)
        return optimizer_update.fake(*arguments)

    specs, weights, gradients = {}, {}, {}
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], deviation: float) -> Tensor:
        values = torch.empty(shape, device=device)
        return values if generator is None else values.normal_(0, deviation, generator=generator)

    for number, (*rows, width) in enumerate(shapes):
        fqn, shape = f"w{number}", (*(max(1, count // scale) for count in rows), width)
        planned = plan != StateFormats()
        specs[fqn] = ParamSpec(fqn, "hidden", shape, 1, 1, "normal", 0.02, 1.0, "lr_times_lambda", planned)
        weights[fqn] = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        gradient = normal(shape, 1e-4)
        stored = (gradient.view(-1),)
        if planned:
            stored = quantize_blocks(as_blocks(gradient, 128), E4M3)
        gradients[fqn] = _Gradient(StoredGradient(*stored))
    optimizer = Optimizer(rule, weights, specs, plan, seed=1, update=keep)
    if generator is not None:
        for fqn, spec in specs.items():
            optimizer.states.seed_master(fqn, normal(spec.global_shape, 0.02))
    one = torch.ones((), device=device)
    optimizer.step(gradients.__getitem__, step=1, lr_factor=1.0, grad_multiplier=one)
    assert len(seen) == 1, optimizer.describe_pass()
    if generator is not None:
        optimizer_update.reference(*seen[0])
    return seen[0]


@dataclass(frozen=True)
class _Gradient:
    """A gradient that only a kernel reads."""

    memory: StoredGradient

    def chunk(self, start: int, stop: int) -> Tensor:
        raise AssertionError("not in chunks")

    def stored(self, count: int) -> StoredGradient:
        return self.memory


def _group_operands() -> Iterator[Case]:
    x = _empty(TOKENS, HIDDEN)
    granularities: tuple[Granularity, ...] = ("row", "block_1x128", "mx_1x32", "block_128x128")
    for name in granularities:
        rule = GroupRule.of(QuantSpec(E4M3, name))
        directed = name != "block_128x128"
        yield Case("cast_groups", f"{name}, along rows", (x, *rule, 1, True, not directed))
        if directed:
            yield Case("cast_groups", f"{name}, along columns", (x, *rule, 0, False, True))
            yield Case("cast_both", name, (x, *rule))
    free = GroupRule.of(QuantSpec(E5M2, "block_1x128", power_of_two=False))
    yield Case("cast_both", "block_1x128, fp32 scales", (x, *free))


def _scale_layouts() -> Iterator[Case]:
    yield Case("mx_scales", "x", (_empty(TOKENS, HIDDEN // 32, dtype=torch.float32),))
    yield Case("square_scales", "w", (_empty(FFN // 128, HIDDEN // 128, dtype=torch.float32),))


def _norms() -> Iterator[Case]:
    x, weight = _empty(TOKENS, HIDDEN), _empty(HIDDEN)
    rstd, partials = (_empty(size, dtype=torch.float32) for size in (TOKENS, 1024))
    for kind, mean, bias in (("rms", None, None), ("layer", rstd, weight)):
        rest = (weight, bias, 1e-5, kind)
        yield Case("residual_norm", f"{kind}, amax", (x, x, *rest, False, True))
        yield Case("residual_norm", f"{kind}, y", (x, x, *rest, True, False))
        yield Case("norm_cast", kind, (x, mean, rstd, weight, bias, partials, None, *X, True, True))
        yield Case("norm_backward", kind, (x, x, x, mean, rstd, weight, bias is not None))
    yield Case("norm_forward", "rms", (x, None, rstd, weight, None))
    yield Case("norm_amax", "rms", (x, None, rstd, weight, None))
    heads, gain = _empty(TOKENS * HEADS, HEAD_DIM), _empty(HEAD_DIM)
    inverse = _empty(TOKENS * HEADS, dtype=torch.float32)
    yield Case("residual_norm", "heads", (heads, None, gain, None, 1e-5, "rms", True, False))
    yield Case("norm_backward", "heads", (heads, None, heads, None, inverse, gain, False))
    for width in (8192, 16384):
        wide, gain = _empty(TOKENS, width), _empty(width)
        yield Case("residual_norm", str(width), (wide, wide, gain, None, 1e-5, "rms", False, True))
        yield Case("norm_backward", str(width), (wide, wide, wide, None, rstd, gain, False))
        yield Case("norm_backward", f"layer {width}", (wide, wide, wide, rstd, rstd, gain, True))


def _activations() -> Iterator[Case]:
    fused, h, partials = _empty(TOKENS, 2 * FFN), _empty(TOKENS, FFN), _empty(1024, dtype=torch.float32)
    for name, inputs, inputs_grad in (
        ("swiglu", (fused, 128, 1.0, 1.0), (fused, h, 128, 1.0, 1.0)),
        ("gelu", (h, False, 1.0, 1.0), (h, h, False, 1.0, 1.0)),
        ("gelu", (h, True, 1.0, 1.0), (h, h, True, 1.0, 1.0)),
    ):
        variant = "tanh" if inputs[1] is True else "bf16"
        yield Case(f"{name}_forward", variant, inputs)
        yield Case(f"{name}_amax", variant, inputs)
        yield Case(f"{name}_cast", variant, (*inputs, partials, None, *X, True, True))
        yield Case(f"{name}_backward", variant, inputs_grad)
        yield Case(f"{name}_grad_amax", variant, inputs_grad)
        yield Case(f"{name}_grad_cast", variant, (*inputs_grad, partials, None, *GRADIENT, True, True))


def _rotary() -> Iterator[Case]:
    batch, length = 2, TOKENS // 2
    cos = _empty(length, HEAD_DIM // 2, dtype=torch.float32)
    qkv = _empty(batch, length, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    yield Case("split_heads", "rotated", (qkv, cos, cos, KV_HEADS, HEAD_DIM))
    yield Case("split_heads", "plain", (qkv, None, None, KV_HEADS, HEAD_DIM))
    query, key = (_empty(batch, length, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    inputs, partials = (query, key, key, cos, cos), _empty(1024, dtype=torch.float32)
    yield Case("heads_grad_forward", "bf16", inputs)
    yield Case("heads_grad_amax", "bf16", inputs)
    yield Case("heads_grad_cast", "bf16", (*inputs, partials, None, *GRADIENT, True, True))
    merged = (query, key, key, None, None, partials, None, *GRADIENT, True, True)
    yield Case("heads_grad_cast", "not rotated", merged)


def _block_gradients() -> Iterator[Case]:
    """A bucket of three weights of an MLP: cast whole from an accumulator, and one weight alone."""
    blocks, segments = 3 * FFN * HIDDEN // 128, 3
    accumulated, gradient = _empty(blocks, 128, dtype=torch.float32), _empty(FFN, HIDDEN)
    ends, scales = _empty(segments, dtype=torch.int64), _empty(blocks, dtype=torch.uint8)
    squares = _empty(segments, 1024, dtype=torch.float64)
    codes, residual = _empty(blocks, 128, dtype=torch.uint8), _empty(blocks, 128)
    yield Case(
        "cast_blocks", "fp32, squares", (accumulated, None, ends, codes, scales, None, squares, 3), blocks
    )
    yield Case(
        "cast_blocks",
        "fp32, feedback",
        (accumulated, residual, ends, codes, scales, residual.clone(), squares, 3),
        blocks,
    )
    own, own_scales = codes[: blocks // 3], scales[: blocks // 3]
    yield Case("cast_blocks", "bf16, squares", (gradient, None, None, own, own_scales, None, squares[:1], 3))
    yield Case("cast_blocks", "bf16", (gradient, None, None, own, own_scales, None, None, 3))
    short = _empty(FFN, HIDDEN - 1)
    yield Case("cast_blocks", "bf16, short blocks", (short, None, None, own, own_scales, None, None, 3))
    yield Case("squares_of_blocks", "e4m3", (codes.view(torch.float8_e4m3fn), scales, ends), blocks)


def _exchanged_gradients() -> Iterator[Case]:
    """The same bucket between 8 ranks; under ZeRO blocks are sent in another order."""
    ranks, blocks = 8, 3 * FFN * HIDDEN // 128
    codes, scales = _empty(blocks, 128, dtype=torch.uint8), _empty(blocks, dtype=torch.uint8)
    message = _empty(ranks, blocks // ranks * 129, dtype=torch.uint8)
    yield Case("pack_parts", "e4m3", (codes, scales, None, ranks))
    order = _empty(blocks, dtype=torch.int32)
    yield Case("pack_parts", "e4m3, order", (codes, scales, order, ranks), blocks - 1)
    yield Case("unpack_parts", "e4m3", (message, codes, scales))
    yield Case("sum_parts", "fp32", (message, 128, 3, 0))
    yield Case("sum_parts", "cast", (message, 128, 3, 1))
    yield Case("sum_parts", "cast, 4 parts", (message, 128, 3, 4))
    yield Case("sum_parts", "bf16, cast", (_empty(ranks, blocks // ranks * 128), 128, 3, 1))


def _head() -> Iterator[Case]:
    """A chunk of tokens, and the gradient of the head's weight once for all chunks."""
    logits = _empty(1024, VOCAB, dtype=torch.float32)
    column, one = _empty(1024, 1, dtype=torch.int64), _empty(1024, 1, dtype=torch.float32)
    yield Case("softmax_statistics", "fp32", (logits, column, VOCAB, 1.0), VOCAB - 1)
    yield Case("softmax_statistics", "fp32, padded, alpha", (logits, column, VOCAB - 7, 0.5), VOCAB - 8)
    rest = (one, one, column, one, one)
    yield Case("softmax_gradient", "bf16", (logits, *rest, VOCAB, 1.0, torch.bfloat16), VOCAB - 1)
    yield Case("softmax_gradient", "fp32", (logits, *rest, VOCAB, 1.0, torch.float32), VOCAB - 1)
    factor = _empty(dtype=torch.float32)
    wide = _empty(VOCAB, HIDDEN, dtype=torch.float32)
    yield Case("times_factor", "fp32 to bf16", (wide, factor, torch.bfloat16))
    yield Case("times_factor", "bf16", (_empty(TOKENS, HIDDEN), factor, torch.bfloat16))


_GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (
    _operands,
    _group_operands,
    _scale_layouts,
    _norms,
    _activations,
    _rotary,
    _block_gradients,
    _exchanged_gradients,
    _head,
    _updates,
    _stored_weights,
)


def cases() -> list[Case]:
    """All cases; every operation has one."""
    return [case for group in _GROUPS for case in group()]
