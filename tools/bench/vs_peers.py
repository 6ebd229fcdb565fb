"""Training speed on a CPU beside what one would use without a framework: the same Llama, loss and clipping.

* ``transformers FP32`` and ``transformers BF16``: ``LlamaForCausalLM`` with SDPA attention, FP32 weights,
  without and with BF16 autocast, ``torch.optim.AdamW(fused=True)``, ``clip_grad_norm_``.
* ``plain FP32`` and ``plain BF16``: the shortest loop in plain torch (:mod:`plain_llama`), likewise.
* ``fp8train O0``: our :class:`~fp8train.step.trainer.Trainer` as ``fp8train train`` runs it: BF16 weights
  and GEMMs, FP32 gradients, FP32 master weights and moments, the same clipping.
* ``fp8train FP8``, ``fp8train O2``: with FP8 GEMMs alone, and the whole level. A CPU has no FP8 units, so
  these are the price of checking a recipe on a laptop.

The last lines say how much of a step is in torch's matrix products and attention, which every variant calls
alike: a bound on what anything else can gain.

All train from equal weights on equal batches; the script refuses to report if their first losses differ by
more than BF16 rounding explains. A CPU without BF16 instructions runs torch's BF16 GEMMs as scalar loops, so
each of ours is compared with the *faster* of a peer's two modes. ``ONEDNN_MAX_CPU_ISA=AVX2`` and
``ATEN_CPU_CAPABILITY=avx2`` make any x86 machine such a one.

    python tools/bench/vs_peers.py --json tools/bench/results/vs_peers_cpu.json               # 20M parameters
    python tools/bench/vs_peers.py --small --json tools/bench/results/vs_peers_3m_cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import Timing, describe_machine, print_table, speed_ratio, time_in_turn, write_json
from plain_llama import PlainLlama
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.config.model_schema import ModelConfig
from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import Config
from fp8train.layers.mlp import shard_unit
from fp8train.step.trainer import Trainer

CPU = torch.device("cpu")
SHARED_KERNELS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product")
"""What all variants leave to torch: matrix products and attention, by how their names begin."""
SMALL = {"layers": 2, "hidden": 192, "heads": 6, "kv_heads": 2, "vocab": 12288, "batch": 2, "tie": True}
MAX_FIRST_LOSS_DIFFERENCE = 0.02  # nats; BF16 rounding gives a few 1e-3
Step = Callable[[int], float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as heads")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=16, help="samples a step, one micro-batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5, help="alternating rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each variant")
    parser.add_argument("--tie", action="store_true", help="one matrix for embedding and head")
    parser.add_argument("--small", action="store_true", help="3 million parameters, a batch of 2")
    parser.add_argument("--cpu-time", action="store_true", help="compare CPU seconds: for a busy machine")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def make_config(args: argparse.Namespace, precision: dict[str, Any]) -> Config:
    """The run as a YAML file would describe it; the dataset is never opened."""
    return resolve_mapping(
        {
            "model": {
                "family": "llama",
                "num_layers": args.layers,
                "hidden_size": args.hidden,
                "num_heads": args.heads,
                "num_kv_heads": args.kv_heads or args.heads,
                "vocab_size": args.vocab,
                "tie_embeddings": args.tie,
            },
            "data": {"prefix": "synthetic", "seq_length": args.seq},
            "precision": precision,
            "optimizer": {"lr": 3.0e-4, "clip_grad_norm": 1.0},
            "schedule": {"kind": "constant"},
            "train": {"steps": 1, "global_batch_size": args.batch, "micro_batch_size": args.batch},
            "logging": {"cast_statistics_interval": 0},
        }
    ).config


def hugging_face_weights(model: ModelConfig, value: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Our master weights under the names of ``LlamaForCausalLM``: QKV split by group, gate and up by unit."""
    groups, per_group, unit = (
        model.num_kv_heads,
        model.num_heads // model.num_kv_heads,
        shard_unit(model.ffn_hidden_size),
    )
    weights = {
        "model.embed_tokens.weight": value("embedding.weight"),
        "model.norm.weight": value("final_norm.weight"),
        "lm_head.weight": value("embedding.weight" if model.tie_embeddings else "head.weight"),
    }
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        qkv = value(f"{ours}.attention.qkv.weight").unflatten(0, (groups, per_group + 2, model.head_dim))
        gate_up = value(f"{ours}.mlp.up.weight").unflatten(0, (-1, 2, unit))
        weights |= {
            f"{theirs}.self_attn.q_proj.weight": qkv[:, :per_group].flatten(0, 2),
            f"{theirs}.self_attn.k_proj.weight": qkv[:, per_group].flatten(0, 1),
            f"{theirs}.self_attn.v_proj.weight": qkv[:, per_group + 1].flatten(0, 1),
            f"{theirs}.self_attn.o_proj.weight": value(f"{ours}.attention.out.weight"),
            f"{theirs}.mlp.gate_proj.weight": gate_up[:, 0].flatten(0, 1),
            f"{theirs}.mlp.up_proj.weight": gate_up[:, 1].flatten(0, 1),
            f"{theirs}.mlp.down_proj.weight": value(f"{ours}.mlp.down.weight"),
            f"{theirs}.input_layernorm.weight": value(f"{ours}.attention_norm.weight"),
            f"{theirs}.post_attention_layernorm.weight": value(f"{ours}.mlp_norm.weight"),
        }
    return weights


def make_transformers(config: Config) -> nn.Module:
    """``LlamaForCausalLM`` of this configuration."""
    m = config.model
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden_size,
            intermediate_size=m.ffn_hidden_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads,
            num_key_value_heads=m.num_kv_heads,
            max_position_embeddings=m.max_seq_len,
            rms_norm_eps=m.norm_eps,
            tie_word_embeddings=m.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def make_theirs(
    config: Config, model: nn.Module, weights: dict[str, Tensor], batches: Tensor, *, bf16: bool
) -> Step:
    """A training step of a model with the names of ``LlamaForCausalLM``: takes the step number, returns the
    loss in nats per token. ``bf16``: under autocast."""
    o = config.optimizer
    model.load_state_dict(weights)
    model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)

    def step(number: int) -> float:
        tokens = batches[number % len(batches)]
        targets = tokens[:, 1:].contiguous()
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            loss = model(input_ids=tokens[:, :-1].contiguous(), labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def make_ours(config: Config, batches: Tensor) -> tuple[Step, Trainer]:
    """A training step of ours, and its trainer."""
    assert config.model.vocab_size is not None
    trainer = Trainer(
        config, Processes(CPU, 1, 0, CountedGroup(None), None), vocab_size=config.model.vocab_size
    )
    return lambda number: float(trainer.step(0, batches[number % len(batches)][None]).loss), trainer


def make_variants(args: argparse.Namespace) -> tuple[dict[str, Step], dict[str, Any]]:
    """The training steps, all from equal weights, and what was trained."""
    config = make_config(args, {})
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, args.vocab, (4, args.batch, args.seq + 1), generator=generator)
    ours, trainer = make_ours(config, batches)
    weights = hugging_face_weights(config.model, trainer.optimizer.states.master)
    variants = {
        f"{peer} {'BF16' if bf16 else 'FP32'}": make_theirs(config, make(config), weights, batches, bf16=bf16)
        for peer, make in (("transformers", make_transformers), ("plain", PlainLlama))
        for bf16 in (False, True)
    }
    variants["fp8train O0"] = ours
    variants["fp8train FP8"] = make_ours(make_config(args, {"gemm": {"fp8": True}}), batches)[0]
    variants["fp8train O2"] = make_ours(make_config(args, {"level": "O2"}), batches)[0]
    sizes = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        **config.model.model_dump(
            include={
                "num_layers",
                "hidden_size",
                "num_heads",
                "num_kv_heads",
                "ffn_hidden_size",
                "vocab_size",
            }
        ),
        "seq_length": args.seq,
        "tokens_per_step": args.batch * args.seq,
    }
    return variants, sizes


def faster_mode(timings: dict[str, Timing], peer: str) -> str:
    """Which of a peer's modes is faster here."""
    return min((f"{peer} FP32", f"{peer} BF16"), key=lambda name: timings[name].median)


def share_in_shared_kernels(step: Step) -> float:
    """The share of one step's operator time that torch's matrix products and attention take."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(0)
    events = recorded.key_averages()
    shared = sum(e.self_cpu_time_total for e in events if e.key.startswith(SHARED_KERNELS))
    return shared / sum(e.self_cpu_time_total for e in events)


def check_first_losses(losses: dict[str, list[float]]) -> None:
    """Equal weights and batches must give equal losses, or the comparison is void."""
    first = {name: values[0] for name, values in losses.items()}
    if max(first.values()) - min(first.values()) > MAX_FIRST_LOSS_DIFFERENCE:
        raise SystemExit(f"the variants do not compute the same loss, nothing to compare: {first}")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    variants, sizes = make_variants(args)
    losses: dict[str, list[float]] = {name: [] for name in variants}
    recorded = {name: lambda n, name=name: losses[name].append(variants[name](n)) for name in variants}
    timings = time_in_turn(
        recorded,
        rounds=args.pairs,
        steps_per_round=args.steps,
        warmup=args.warmup,
        device=CPU,
        clock=time.process_time if args.cpu_time else time.perf_counter,
    )
    check_first_losses(losses)
    tokens = sizes["tokens_per_step"]
    print(
        f"Llama, {sizes['parameters'] / 1e6:.1f}M parameters, {tokens} tokens a step, {args.threads} threads"
    )
    best = {peer: faster_mode(timings, peer) for peer in ("transformers", "plain")}
    rows, entries = [], {}
    for name, timing in timings.items():
        ratios = {peer: speed_ratio(timing, timings[mode]) for peer, mode in best.items()}
        first, last = losses[name][0], losses[name][-1]
        rows.append(
            (name, f"{tokens / timing.median:.0f}", *map(str, ratios.values()), f"{first:.4f}", f"{last:.4f}")
        )
        entries[name] = {
            "tokens_per_second": tokens / timing.median,
            "seconds_per_step": list(timing.seconds),
            "ratios": {p: {"median": r.median, "range": [r.low, r.high]} for p, r in ratios.items()},
            "first_loss": first,
            "last_loss": last,
        }
    header = ("variant", "tokens/s", *(f"÷ {mode}" for mode in best.values()), "first loss", "last loss")
    print_table(header, rows)
    shares = {n: share_in_shared_kernels(variants[n]) for n in (*best.values(), "fp8train O0")}
    print("share of a step in torch's matrix products and attention, which all call alike:")
    print("; ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    bounds = {peer: entries["fp8train O0"]["ratios"][peer]["median"] / shares["fp8train O0"] for peer in best}
    print(
        "O0's ratio if all else in it took no time:", ", ".join(f"{r:.2f} ({p})" for p, r in bounds.items())
    )
    if args.json is not None:
        machine = describe_machine(CPU) | {"transformers": transformers.__version__}
        clock = "CPU seconds" if args.cpu_time else "wall seconds"
        result = {"machine": machine, "model": sizes, "clock": clock, "compared_with": best}
        result |= {"share_in_shared_kernels": shares, "ratio_if_all_else_were_free": bounds}
        write_json(args.json, result | {"variants": entries})


if __name__ == "__main__":
    main()
