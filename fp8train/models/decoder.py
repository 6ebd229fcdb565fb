"""The decoder: embedding, blocks, final norm, head.

GPT and Llama differ only in :class:`~fp8train.config.schema.ModelConfig`. Names of parameters are part of the
checkpoint format: ``embedding.weight``, ``positions.weight``, ``layers.{i}.attention.qkv.weight``,
``layers.{i}.mlp.down.weight``, ``final_norm.weight``, ``head.weight``; layers keep their global index
whatever part of the model a process holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8train.config.schema import ModelConfig
from fp8train.layers.attention import KVCache
from fp8train.layers.embedding import Embedding, OutputHead
from fp8train.layers.linear import Linear
from fp8train.layers.loss import linear_cross_entropy, logits
from fp8train.layers.rotary import RopeScaling, rotary_frequencies, rotary_table
from fp8train.models.block import Block, make_norm, recompute
from fp8train.models.param_spec import Parametrization, ParamSpec, Role

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


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """The vocabulary rounded up to a multiple."""
    return -(-vocab_size // multiple) * multiple


class Decoder(nn.Module):
    """A causal language model.

    Attributes:
        config: its settings, ``vocab_size`` filled in.
        specs: ``{fqn: ParamSpec}`` of all parameters, in module order.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        activation_checkpointing: str = "none",
    ) -> None:
        """Parameters are left uninitialised; see :func:`fp8train.models.build.build_model`."""
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.dtype = dtype
        self.full_recompute = activation_checkpointing == "full"
        self.parametrization = Parametrization.standard(config)
        rows = padded_vocab_size(config.vocab_size, config.vocab_multiple)
        self.embedding = Embedding(rows, config.hidden_size, dtype=dtype, device=device)
        if config.positions == "learned":
            self.positions = Embedding(config.max_seq_len, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleDict(
            {
                str(i): Block(
                    config,
                    self.parametrization,
                    dtype=dtype,
                    device=device,
                    selective_recompute=activation_checkpointing == "selective",
                )
                for i in range(config.num_layers)
            }
        )
        self.final_norm = make_norm(config, dtype, device)
        if not config.tie_embeddings:
            self.head = OutputHead(rows, config.hidden_size, dtype=dtype, device=device)
        self._rotary: tuple[Tensor, Tensor] | None = None
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.name, module.alphas = name, self.parametrization.alphas
        self.specs: dict[str, ParamSpec] = {
            fqn: self.parametrization.spec(fqn, role_of(fqn), tuple(parameter.shape))
            for fqn, parameter in self.named_parameters()
        }

    def linears(self) -> dict[str, Linear]:
        """The hidden linears by module path, in order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    @property
    def head_weight(self) -> Tensor:
        """[padded vocabulary, H]."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def prepare(self) -> None:
        """Quantise the weights that changed since the last forward, outside any compiled region."""
        for linear in self.linears().values():
            linear.quantize_weight()
            linear.record_weight()

    def hidden(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Final normalised states.

        Args:
            tokens: int64 [B, S].
            caches: one per layer; tokens then continue what the caches hold.

        Returns:
            [B, S, H].
        """
        self.prepare()
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        assert end <= self.config.max_seq_len, f"{end} positions exceed max_seq_len {self.config.max_seq_len}"
        x = self.embedding(tokens)
        cos = sin = None
        if self.config.positions == "learned":
            x = x + self.positions.weight[start:end]
        else:
            cos, sin = (table[start:end] for table in self._rotary_table(tokens.device))
        for i, block in enumerate(self.layers.values()):
            if self.full_recompute and caches is None and torch.is_grad_enabled():
                x = recompute(block, x, cos, sin)
            else:
                x = block(x, cos, sin, None if caches is None else caches[i])
        return self.final_norm(x)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats. Shapes: int64 [B, S] each; target -100 is left out. Returns
        an FP32 (FP64) scalar."""
        hidden = self.hidden(tokens)
        assert self.config.vocab_size is not None
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, targets.flatten(), vocab_size=self.config.vocab_size
        )

    def logits(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """[B, S, vocab_size] in the compute dtype."""
        assert self.config.vocab_size is not None
        return logits(self.hidden(tokens, caches), self.head_weight, vocab_size=self.config.vocab_size)

    def make_caches(self, batch: int, capacity: int) -> list[KVCache]:
        """Empty key/value caches for generation."""
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
