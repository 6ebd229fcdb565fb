"""The decoder: embedding, blocks, final norm, head.

GPT and Llama differ only in :class:`~fp8train.config.model_schema.ModelConfig`. Names of parameters are part
of the checkpoint format: ``embedding.weight``, ``positions.weight``, ``layers.{i}.attention.qkv.weight``,
``layers.{i}.mlp.down.weight``, ``final_norm.weight``, ``head.weight``; layers keep their global index
whatever part of the model a process holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.comm.context_parallel import ContextParallel
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.config.optimizer_schema import DecayRule
from fp8train.layers.attention import KVCache
from fp8train.layers.embedding import Embedding, OutputHead, Positions, TiedHead
from fp8train.layers.factors import scale, scale_backward
from fp8train.layers.fp8_head import Fp8Head
from fp8train.layers.gradient_amax import GradientAmax
from fp8train.layers.linear import Linear
from fp8train.layers.loss import linear_cross_entropy, logits
from fp8train.layers.rotary import RopeScaling, rotary_frequencies, rotary_table
from fp8train.models.block import Block, make_norm, recompute
from fp8train.models.fused_block import fused_block
from fp8train.models.param_spec import ParamSpec, Role, Shard
from fp8train.models.parametrization import Parametrization
from fp8train.models.part import ModelPart
from fp8train.models.shapes import padded_vocab_size, split_dim

_ROLES: dict[str, Role] = {
    "embedding.weight": "embedding",
    "positions.weight": "position",
    "head.weight": "head",
    "attention.qkv.weight": "hidden",
    "attention.out.weight": "residual_out",
    "mlp.up.weight": "hidden",
    "mlp.down.weight": "residual_out",
}


def role_of(fqn: str) -> Role:
    """The role of a decoder parameter by its name."""
    for suffix, role in _ROLES.items():
        if fqn == suffix or fqn.endswith("." + suffix):
            return role
    if fqn.endswith("norm.weight"):
        return "norm"
    assert fqn.endswith(".bias"), f"parameter {fqn} has no role"
    return "bias"


class Decoder(nn.Module):
    """A causal language model, or the part of it that this process holds: embedding, blocks, final norm,
    head.

    Attributes:
        config: its settings.
        vocab_size: tokens, without padding.
        part: what of the model it holds.
        fp8_head: how the head multiplies in FP8; None: in the compute type.
        gemm_context: makes what a whole forward runs in, for linears that need that.
        specs: ``{fqn: ParamSpec}`` of all parameters it holds, in module order.
    """

    def __init__(
        self,
        parametrization: Parametrization,
        *,
        decay_rule: DecayRule = "lr_times_lambda",
        in_fp8_plan: Collection[str] = (),
        dtype: torch.dtype,
        device: torch.device | None = None,
        activation_checkpointing: str = "none",
        fp8_saved: bool = False,
        part: ModelPart | None = None,
        parallel: TensorParallel | None = None,
        context: ContextParallel | None = None,
    ) -> None:
        """Parameters are left uninitialised; see :func:`fp8train.models.build.build_model`.
        ``parametrization``: the model's settings and multipliers; ``in_fp8_plan``: names of the matrices that
        multiply in FP8; ``part``: what to hold of the model, by default everything; ``fp8_saved``: what norms
        and non-linearities of blocks keep for backward is FP8; ``parallel``: ranks among which its matrices
        are cut; ``context``: ranks with the other tokens of each sequence."""
        super().__init__()
        config = parametrization.model
        self.context = context
        self.fp8_head: Fp8Head | None = None
        self.gemm_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.parallel = split = None if parallel is None or parallel.size == 1 else parallel
        self.config = config
        self.part = part = ModelPart.whole(config.num_layers) if part is None else part
        self.dtype = dtype
        self.full_recompute = activation_checkpointing == "full"
        self.parametrization, self.vocab_size = parametrization, parametrization.vocab_size
        rows = padded_vocab_size(self.vocab_size, config.vocab_multiple)
        if part.begins or (part.ends and config.tie_embeddings):
            self.embedding = Embedding(rows, config.hidden_size, dtype=dtype, device=device, parallel=split)
        if part.begins and config.positions == "learned":
            self.positions = Positions(config.max_seq_len, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleDict(
            {
                str(i): Block(
                    i,
                    parametrization,
                    dtype=dtype,
                    device=device,
                    selective_recompute=activation_checkpointing == "selective",
                    fp8_saved=fp8_saved,
                    parallel=parallel,
                    context=context,
                )
                for i in part.layers
            }
        )
        if part.ends:
            self.final_norm = make_norm(parametrization, dtype, device)
            self.head = (
                TiedHead(self.embedding)
                if config.tie_embeddings
                else OutputHead(rows, config.hidden_size, dtype=dtype, device=device, parallel=split)
            )
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.specs: dict[str, ParamSpec] = {
            fqn: replace(self._spec(fqn, parameter, decay_rule), in_fp8_plan=fqn in in_fp8_plan)
            for fqn, parameter in self.named_parameters()
        }

    def _spec(self, fqn: str, parameter: Tensor, decay_rule: DecayRule) -> ParamSpec:
        shape, dim, shard = list(parameter.shape), split_dim(fqn), None
        if self.parallel is not None and dim is not None:
            shard = Shard(dim, self.parallel.rank, self.parallel.size)
            shape[dim] *= shard.count
        spec = self.parametrization.spec(fqn, role_of(fqn), tuple(shape), decay_rule=decay_rule)
        return replace(spec, shard=shard, sequence_partial=self.parallel is not None and shard is None)

    def linears(self) -> dict[str, Linear]:
        """The hidden linears by module path, in order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def held_blocks(self) -> list[Block]:
        """The blocks that this process holds, in order."""
        return [block for block in self.layers.values() if isinstance(block, Block)]

    @property
    def head_fqn(self) -> str:
        """Name of :attr:`head_weight`."""
        return "embedding.weight" if self.config.tie_embeddings else "head.weight"

    @property
    def head_weight(self) -> Tensor:
        """The weight that makes logits, [padded vocabulary, H]: the embedding's where they are tied."""
        return self.head.weight

    def borrowed_weights(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter) wherever a module's forward reads a parameter that another one owns. Who
        gathers parameters module by module, as ZeRO-3 does, has to know
        (``deepspeed.zero.register_external_parameter``); all others are read by the module that owns them."""
        head = self.head if self.part.ends else None
        return [(head, head.weight)] if isinstance(head, TiedHead) else []

    def prepare(self) -> None:
        """Make the operands of weights that changed since the last forward, outside any compiled region."""
        for name, linear in self.linears().items():
            planned = self.specs[f"{name}.weight"].in_fp8_plan
            assert linear.plan is not None or linear.is_native or not planned, (
                f"{name} is in the FP8 plan but not connected; see fp8train.models.connect"
            )
            linear.quantize_weight()
            linear.record_weight()
        if torch.is_grad_enabled():
            for block in self.held_blocks():
                for linear in block.linears if block.compiled else ():
                    linear.make_backward_operand()

    def hidden(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Compute final normalised states, the head's input.

        Args:
            tokens: int64 [B, S].
            caches: one per layer; tokens then continue what the caches hold.

        Returns:
            [B, S, H].
        """
        self.prepare()
        start = caches[0].length if caches else 0
        x = self.embed(tokens, start)
        span = slice(start, start + tokens.shape[1])
        return self.final_norm(self.blocks(x, self.part.layers, span, caches))

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """States before the first block: int64 [B, S] -> [B, S, H] (S/tp with tensor parallelism, here and in
        all states). ``start``: position of the first token."""
        start += self._first_position(tokens.shape[1])
        end = start + tokens.shape[1]
        assert end <= self.config.max_seq_len, f"{end} positions exceed max_seq_len {self.config.max_seq_len}"
        factors = self.parametrization
        x = scale_backward(self.embedding(tokens), factors.lookup_grad(self.vocab_size))
        if self.config.positions != "learned":
            return x
        start += 0 if self.parallel is None else self.parallel.rank * x.shape[1]
        positions = self.positions(start, start + x.shape[1])
        positions = scale_backward(positions, factors.lookup_grad(self.config.max_seq_len))
        return scale(x + positions, factors.embedding_sum())

    def blocks(
        self, x: Tensor, layers: Sequence[int], span: slice, caches: list[KVCache] | None = None
    ) -> Tensor:
        """Run these blocks: [B, S, H] -> [B, S, H]. ``span``: the tokens' positions in their sequences. Call
        :meth:`prepare` before."""
        cos = sin = None
        first = self._first_position(span.stop - span.start)
        span = slice(first + span.start, first + span.stop)
        if self.config.positions == "rope":
            cos, sin = (table[span] for table in self._rotary_table(x.device))
        delta: Tensor | None = None  # a branch that has yet to join the stream
        delta_amax: GradientAmax | None = None  # of its gradient
        for i, layer in enumerate(layers):
            block = self.layers[str(layer)]
            recomputes = self.full_recompute and caches is None and torch.is_grad_enabled()
            fused = None if caches is not None else fused_block(block, x, delta_amax)
            if fused is not None:
                delta_amax = fused.mlp.out_amax
                x, delta = recompute(fused, x, delta, cos, sin) if recomputes else fused(x, delta, cos, sin)
                continue
            if delta is not None:
                x, delta, delta_amax = x + delta, None, None
            if recomputes:
                x = recompute(block, x, cos, sin)
            else:
                x = block(x, cos, sin, None if caches is None else caches[i])
        return x if delta is None else x + delta

    def _first_position(self, length: int) -> int:
        """Position of the first token of this rank's part of a sequence."""
        return 0 if self.context is None else self.context.offset(length)

    def state_shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Shape of the states between blocks, of ``batch`` sequences of ``length`` tokens."""
        ways = 1 if self.parallel is None else self.parallel.size
        return (batch, length // ways, self.config.hidden_size)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats of final normalised states [B, S, H]; see :meth:`forward`."""
        multiply = partial(
            linear_cross_entropy,
            targets=targets,
            vocab_size=self.vocab_size,
            parallel=self.parallel,
            alphas=self.parametrization.head(),
            fp8=self.fp8_head,
        )
        loss: Tensor = self.head(hidden, multiply)
        return loss

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats. Shapes: int64 [B, S] each; target -100 is left out. Returns
        an FP32 (FP64) scalar."""
        with self.gemm_context():
            return self.loss(self.hidden(tokens), targets)

    def logits(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Compute logits of every position, [B, S, vocab_size] in the compute dtype, from int64 [B, S]."""
        assert self.parallel is None, "logits of a model that is cut over ranks"
        alpha = self.parametrization.head().output
        multiply = partial(logits, vocab_size=self.vocab_size, alpha=alpha, fp8=self.fp8_head)
        found: Tensor = self.head(self.hidden(tokens, caches), multiply)
        return found

    def make_caches(self, batch: int, capacity: int) -> list[KVCache]:
        """Make one empty key/value cache per block, for generation."""
        c = self.config
        return [
            KVCache(batch, c.num_kv_heads, capacity, c.head_dim, self.embedding.weight) for _ in self.layers
        ]

    def _rotary_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rotary is None or self._rotary[0].device != device:
            c = self.config
            scaling = None if c.rope_scaling is None else RopeScaling(**c.rope_scaling.model_dump())
            frequencies = rotary_frequencies(c.head_dim, c.rope_theta, scaling)
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            cos, sin = rotary_table(frequencies, c.max_seq_len, wide)
            self._rotary = cos.to(device), sin.to(device)
        return self._rotary
