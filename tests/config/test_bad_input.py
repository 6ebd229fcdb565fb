"""Every way a config can be wrong, with the exact message: it must name file, line and key, and say what to
write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.examples import MINIMAL, message_of, write

YAML_CASES = {
    "tab": (
        "model:\n\tfamily: gpt\n",
        "run.yaml:2:1: tab used for indentation; YAML allows only spaces there",
    ),
    "syntax": (
        "model: {family: gpt\ndata: x\n",
        "run.yaml:2:5: YAML syntax error: expected ',' or '}', but got ':' (while parsing a flow mapping)",
    ),
    "unclosed_quote": (
        'run: {name: "x\n',
        "run.yaml:2:1: YAML syntax error: found unexpected end of stream (while scanning a quoted scalar)",
    ),
    "bad_escape": (
        'a: "\\UFFFFFFFF"\n',
        "run.yaml: YAML syntax error: Python int too large to convert to C int",
    ),
    "duplicate": (
        "optimizer:\n  lr: 1e-3\n  beta1: 0.9\n  lr: 1e-4\n",
        "run.yaml:4:3: optimizer: duplicate key 'lr' (first at line 2); keep one",
    ),
    "duplicate_section": (
        "train: {steps: 1}\ntrain: {steps: 2}\n",
        "run.yaml:2:1: duplicate key 'train' (first at line 1); keep one",
    ),
    "python_object": (
        "run:\n  name: !!python/object/apply:os.system [touch owned]\n",
        "run.yaml:2:9: tag !!python/object/apply:os.system is refused: a config holds plain values only; "
        "nothing was executed",
    ),
    "custom_tag": (
        "run: {seed: !secret 3}\n",
        "run.yaml:1:13: tag !secret is refused: a config holds plain values only; nothing was executed",
    ),
    "empty": (
        "",
        "run.yaml: the file is empty; a config is a mapping of sections, at least model, data, "
        "optimizer and train",
    ),
    "comments_only": (
        "# nothing\n",
        "run.yaml: the file is empty; a config is a mapping of sections, at least model, data, "
        "optimizer and train",
    ),
    "list": (
        "- model\n- data\n",
        "run.yaml:1: the top level is a list; a config is a mapping of sections such as  model: ...",
    ),
    "scalar": (
        "hello\n",
        "run.yaml:1: the top level is a single value; a config is a mapping of sections such as  model: ...",
    ),
    "number_key": (
        "train:\n  1: 2\n",
        "run.yaml:2:3: key 1 is not text; keys are names such as  steps:",
    ),
    "list_key": ("? [a, b]\n: 1\n", "run.yaml:1:3: a key must be text, not a list or a mapping"),
    "octal": (
        "run:\n  seed: 010\n",
        "run.yaml:2:9: run.seed: 010 looks octal (8-based in YAML 1.1, decimal in YAML 1.2); "
        'write 10 for the number or "010" for text',
    ),
    "second_document": (
        "a: 1\n---\nb: 2\n",
        "run.yaml:2:1: a second document (---) starts here; a config is one document",
    ),
    "directive": (
        "%YAML 1.1\n---\na: no\n",
        "run.yaml:1: YAML directives (%...) are not supported; remove the line",
    ),
    "merge_key": (
        "a: &x {b: 1}\nc:\n  <<: *x\n",
        "run.yaml:3:3: merge keys (<<) are YAML 1.1; use  base: other.yaml  to build on another file",
    ),
    "undefined_alias": ("a: *x\n", "run.yaml:1:4: alias *x has no anchor &x before it"),
    "self_alias": ("a: &x [*x]\n", "run.yaml:1:8: alias *x refers to a value that contains it"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "run.yaml:1:53: nested deeper than 50 levels"),
    "nul": (
        'run: {dir: "a\\0b"}\n',
        "run.yaml:1:12: run.dir: text holds the unprintable character U+0000; remove it",
    ),
    "long_number": (
        f"run: {{seed: {'9' * 5000}}}\n",
        "run.yaml:1:13: run.seed: a number of 5000 characters; at most 400 are read",
    ),
}


@pytest.mark.parametrize("name", YAML_CASES)
def test_yaml(name: str, tmp_path: Path) -> None:
    text, expected = YAML_CASES[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message_of(path) == expected
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize("levels", [6, 30])
def test_alias_bomb_is_bounded(levels: int, tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    message = message_of(write(tmp_path, "\n".join(lines)))
    assert "run.yaml:4:" in message or "run.yaml:5:" in message
    assert message.endswith("more than 20,000 values with aliases expanded; this is not a config")


def changed(old: str, new: str) -> str:
    assert MINIMAL.count(old) == 1
    return MINIMAL.replace(old, new)


def with_line(section: str, line: str) -> str:
    return changed(f"{section}:\n", f"{section}:\n  {line}\n")


VALUE_CASES = {
    "typo": (
        changed("lr: 3e-4", "lerning_rate: 3e-4\n  lr: 1"),
        "run.yaml:10: optimizer.lerning_rate: unknown key; did you mean optimizer.lr?",
    ),
    "typo_sibling": (
        with_line("train", "global_batchsize: 3"),
        "run.yaml:12: train.global_batchsize: unknown key; did you mean train.global_batch_size?",
    ),
    "other_section": (
        with_line("train", "lr: 3"),
        "run.yaml:12: train.lr: unknown key; did you mean optimizer.lr?",
    ),
    "other_framework": (
        with_line("model", "n_kv_heads: 2"),
        "run.yaml:2: model.n_kv_heads: unknown key; did you mean model.num_kv_heads?",
    ),
    "unknown_section": (
        MINIMAL + "optimiser: {lr: 1}\n",
        "run.yaml:15: optimiser: unknown key; did you mean optimizer?",
    ),
    "nothing_near": (
        MINIMAL + "parallel: {zzz: 1}\n",
        "run.yaml:15: parallel.zzz: unknown key; parallel has dp, tp, cp, pp, pipeline, zero, zero_partition",
    ),
    "dotted_key": (
        MINIMAL + "run.seed: 3\n",
        "run.yaml:15: run.seed: unknown key; write it nested, key seed under section run",
    ),
    "bool_for_int": (
        changed("steps: 10", "steps: true"),
        "run.yaml:12: train.steps: expected a whole number >= 1, or null; got true",
    ),
    "no_for_int": (
        changed("steps: 10", "steps: no"),
        "run.yaml:12: train.steps: expected a whole number >= 1, or null; got 'no'; no is text, not a number",
    ),
    "no_for_float": (
        changed("lr: 3e-4", "lr: off"),
        "run.yaml:10: optimizer.lr: expected a number > 0; got 'off'; off is text, not a number",
    ),
    "yes_for_bool": (
        MINIMAL + "run: {overwrite: yes}\n",
        "run.yaml:15: run.overwrite: expected true or false; got 'yes'; write true without quotes",
    ),
    "off_for_bool": (
        with_line("model", "bias: off"),
        "run.yaml:2: model.bias: expected true or false; got 'off'; write false without quotes",
    ),
    "int_for_bool": (
        with_line("model", "bias: 1"),
        "run.yaml:2: model.bias: expected true or false; got 1",
    ),
    "quoted_number": (
        changed("lr: 3e-4", 'lr: "3e-4"'),
        "run.yaml:10: optimizer.lr: expected a number > 0; got '3e-4'; write 0.0003 without quotes",
    ),
    "underscores": (
        changed("steps: 10", "steps: 1_000"),
        "run.yaml:12: train.steps: expected a whole number >= 1, or null; got '1_000'; "
        "write 1000 without separators",
    ),
    "float_for_int": (
        changed("steps: 10", "tokens: 1e9"),
        "run.yaml:12: train.tokens: expected a whole number >= 1, or null; got 1e+09; write 1000000000",
    ),
    "half": (
        changed("num_layers: 2", "num_layers: 2.5"),
        "run.yaml:3: model.num_layers: expected a whole number >= 1; got 2.5",
    ),
    "infinite": (
        changed("lr: 3e-4", "lr: .inf"),
        "run.yaml:10: optimizer.lr: expected a number > 0; got inf; it must be finite",
    ),
    "nan": (
        changed("lr: 3e-4", "lr: .nan"),
        "run.yaml:10: optimizer.lr: expected a number > 0; got nan; it must be finite",
    ),
    "negative": (
        changed("lr: 3e-4", "lr: -1"),
        "run.yaml:10: optimizer.lr: expected a number > 0; got -1",
    ),
    "too_large": (
        changed("steps: 10", "steps: 9223372036854775808"),
        "run.yaml:12: train.steps: expected a whole number >= 1 and <= 1000000000, or null; got "
        "9223372036854775808",
    ),
    "number_for_text": (
        MINIMAL + "run: {name: 125}\n",
        "run.yaml:15: run.name: expected text of letters, digits, dot, dash and underscore (at most "
        "120 characters); "
        'got 125; write "125" in quotes',
    ),
    "path_traversal": (
        MINIMAL + "run: {name: ../../x}\n",
        "run.yaml:15: run.name: expected text of letters, digits, dot, dash and underscore (at most "
        "120 characters); "
        "got '../../x'",
    ),
    "literal": (
        changed("family: llama", "family: lllama"),
        "run.yaml:2: model.family: expected one of: gpt, llama; got 'lllama'; did you mean llama?",
    ),
    "literal_far": (
        changed("family: llama", "family: bert"),
        "run.yaml:2: model.family: expected one of: gpt, llama; got 'bert'",
    ),
    "union": (
        MINIMAL + "parallel: {dp: all}\n",
        "run.yaml:15: parallel.dp: expected a whole number >= 1 or auto; got 'all'",
    ),
    "level": (
        MINIMAL + "precision: {level: O7}\n",
        "run.yaml:15: precision.level: expected one of: O0, O1, O2, O3; got 'O7'",
    ),
    "section_is_scalar": (
        MINIMAL + "schedule: cosine\n",
        "run.yaml:15: schedule: expected a section with the keys kind, warmup_steps, "
        "warmup_fraction, min_lr_ratio, "
        "decay_fraction; got 'cosine'",
    ),
    "section_is_empty": (
        MINIMAL + "logging:\n",
        "run.yaml:15: logging: the section is empty; remove the line, or put keys under it",
    ),
    "empty_value": (
        changed("num_layers: 2", "num_layers:"),
        "run.yaml:3: model.num_layers: expected a whole number >= 1; got null; give a value or "
        "remove the line",
    ),
    "empty_preset_value": (
        with_line("model", "head_dim:"),
        "run.yaml:2: model.head_dim: expected a whole number >= 1; got null; give a value or remove the line",
    ),
    "list_entry": (
        with_line("data", "split: [0.9, x, 0]"),
        "run.yaml:7: data.split[1]: expected a number >= 0; got 'x'",
    ),
    "list_length": (
        with_line("data", "split: [1, 0]"),
        "run.yaml:7: data.split: expected a list of 3 entries, each a number >= 0; got [1, 0]",
    ),
    "text_for_list": (
        MINIMAL + "precision: {gemm: {fp8: true, exclude: layers.0}}\n",
        "run.yaml:15: precision.gemm.exclude: expected a list, each entry text; got 'layers.0'; "
        "write it in brackets: [...]",
    ),
    "blend_entry": (
        changed("prefix: data/corpus", "blend:\n    - prefix: a\n      weight: 1\n    - prefix: b"),
        "run.yaml:10: data.blend[1].weight: is required; an entry is {prefix: data/my_corpus, weight: 1.0}",
    ),
    "blend_weight": (
        changed("prefix: data/corpus", "blend: [{prefix: a, weight: 0}]"),
        "run.yaml:7: data.blend[0].weight: expected a number > 0; got 0",
    ),
    "missing_key": (
        changed("  num_layers: 2\n", ""),
        "run.yaml:1: model.num_layers: is required; for example  num_layers: 12",
    ),
    "missing_lr": (
        changed("  lr: 3e-4\n", "  beta1: 0.8\n"),
        "run.yaml:9: optimizer.lr: is required; for example  lr: 3.0e-04",
    ),
    "missing_section": (
        changed("optimizer:\n  lr: 3e-4\n", ""),
        "run.yaml:1: optimizer: the section is required; for example  optimizer: {lr: 3.0e-04}",
    ),
}


@pytest.mark.parametrize("name", VALUE_CASES)
def test_value(name: str, tmp_path: Path) -> None:
    text, expected = VALUE_CASES[name]
    assert message_of(write(tmp_path, text)) == expected


CONTRADICTIONS = {
    "attention_of_gpus_on_a_cpu": (
        MINIMAL + "run: {device: cpu}\nkernels: {attention: flash3}\n",
        "run.yaml:16: kernels.attention, run.device: kernels.attention: flash3 is for CUDA devices, but "
        "run.device is cpu; write kernels.attention: auto (run.device: run.yaml:15)",
    ),
    "graphs_on_a_cpu": (
        MINIMAL + "run: {device: cpu, cuda_graphs: true}\n",
        "run.yaml:15: run.cuda_graphs, run.device: run.cuda_graphs: true is for CUDA devices, but run.device "
        "is cpu; write run.cuda_graphs: false",
    ),
    "attention_that_depends_on_timing": (
        MINIMAL + "run: {deterministic: true}\nkernels: {attention: cudnn}\n",
        "run.yaml:16: kernels.attention, run.deterministic: kernels.attention: cudnn has a backward pass "
        "that is not deterministic, but run.deterministic is true; write kernels.attention: auto, or "
        "run.deterministic: false (run.deterministic: run.yaml:15)",
    ),
    "attention_in_fp32_by_a_kernel_for_bf16": (
        with_line("model", "attention_in_fp32: true") + "kernels: {attention: flash2}\n",
        "run.yaml:16: kernels.attention, model.attention_in_fp32: kernels.attention: flash2 computes in "
        "BF16, but model.attention_in_fp32 is true; write kernels.attention: auto "
        "(model.attention_in_fp32: run.yaml:2)",
    ),
    "fp64_by_a_kernel_for_bf16": (
        MINIMAL + "kernels: {attention: cudnn}\nprecision: {compute: fp64}\n",
        "run.yaml:15: kernels.attention, precision.compute: kernels.attention: cudnn computes in BF16, but "
        "precision.compute is fp64; write kernels.attention: auto (precision.compute: run.yaml:16)",
    ),
    "steps_and_tokens": (
        with_line("train", "tokens: 1000"),
        "run.yaml:13: train.steps, train.tokens: set exactly one of train.steps and train.tokens; to use the "
        "tokens write train.steps=null, to use the steps train.tokens=null (train.tokens: run.yaml:12)",
    ),
    "neither": (
        changed("  steps: 10\n", ""),
        "run.yaml:11: train.steps, train.tokens: set exactly one of train.steps and train.tokens; for "
        "example train.steps=1000",
    ),
    "prefix_and_blend": (
        with_line("data", "blend: [{prefix: a, weight: 1}]"),
        "run.yaml:8: data.prefix, data.blend: set exactly one of data.prefix and data.blend; to use the "
        "blend write data.prefix=null, to use the one dataset data.blend=null "
        "(data.blend: run.yaml:7)",
    ),
    "empty_blend": (
        changed("prefix: data/corpus", "blend: []"),
        "run.yaml:7: data.blend: blend is empty; list at least one entry {prefix: ..., weight: ...}",
    ),
    "warmups": (
        MINIMAL + "schedule:\n  warmup_steps: 3\n  warmup_fraction: 0.1\n",
        "run.yaml:16: schedule.warmup_steps, schedule.warmup_fraction: "
        "set at most one of schedule.warmup_steps and schedule.warmup_fraction; to use the steps write "
        "schedule.warmup_fraction=null, to use the share schedule.warmup_steps=null "
        "(schedule.warmup_fraction: run.yaml:17)",
    ),
    "valid_prefix": (
        with_line("data", "valid_prefix: x"),
        "run.yaml:7: data.valid_prefix, data.split: valid_prefix is set and split keeps a validation "
        "share too; "
        "write split: [1, 0, 0] or remove valid_prefix",
    ),
    "fp8_off_recipe": (
        MINIMAL + "precision:\n  recipe: mse\n  gemm:\n    fp8: false\n",
        "run.yaml:16: precision.recipe, precision.gemm.fp8: has no effect: precision.gemm.fp8 is false; "
        "remove it, or write precision.gemm.fp8=true (precision.recipe=null takes back what a file sets) "
        "(precision.gemm.fp8: run.yaml:18)",
    ),
    "paper_and_recipe": (
        MINIMAL + "precision:\n  level: O2\n  recipe: te_delayed\n  profile: paper\n",
        "run.yaml:18: precision.profile, precision.recipe: profile: paper has delayed scales of its own, but "
        "recipe is te_delayed; remove one of the two (precision.recipe: run.yaml:17)",
    ),
    "fp8_off_operand": (
        MINIMAL + "precision:\n  gemm:\n    fp8: false\n    output:\n      x: {margin: 1}\n",
        "run.yaml:19: precision.gemm.output.x.margin, precision.gemm.fp8: has no effect: precision.gemm.fp8 "
        "is false; remove it, or write precision.gemm.fp8=true (precision.gemm.output.x.margin=null takes "
        "back what a file sets) (precision.gemm.fp8: run.yaml:17)",
    ),
    "fp8_off_by_level": (
        MINIMAL + "precision:\n  gemm: {keep_x: bf16}\n",
        "run.yaml:16: precision.gemm.keep_x, precision.gemm.fp8: has no effect: precision.gemm.fp8 is false "
        "(preset precision.level=O0); remove it, or write precision.gemm.fp8=true "
        "(precision.gemm.keep_x=null takes back what a file sets)",
    ),
    "two_e5m2": (
        MINIMAL + "precision:\n  gemm:\n    fp8: true\n    grad_weight: {x: {format: e5m2}}\n",
        "run.yaml:18: precision.gemm.grad_weight.grad_output.format, precision.gemm.grad_weight.x.format: "
        "grad_output and x are both e5m2, which no hardware multiplies; write e4m3 for one of them",
    ),
    "keep_same": (
        MINIMAL + "precision:\n  gemm:\n    fp8: true\n    grad_weight: {x: {margin: 1}}\n",
        "run.yaml:18: precision.gemm.keep_x, precision.gemm.output.x, precision.gemm.grad_weight.x: "
        "keep_x: same reuses the payload of output.x, but grad_weight.x is set differently; "
        "make the two equal, or choose requantise, second_copy or bf16",
    ),
    "keep_without_effect": (
        MINIMAL + "precision:\n  gemm:\n    fp8: true\n    keep_w: second_copy\n",
        "run.yaml:18: precision.gemm.keep_w, precision.gemm.output.w, precision.gemm.grad_input.w: "
        "keep_w: second_copy changes nothing, because output.w and grad_input.w are equal; write same",
    ),
    "directed_keep": (
        MINIMAL + "precision:\n  gemm:\n    fp8: true\n    output: {x: {granularity: row}}\n"
        "    grad_weight: {x: {granularity: row}}\n",
        "run.yaml:18: precision.gemm.keep_x, precision.gemm.output.x, precision.gemm.grad_weight.x: "
        "keep_x: same "
        "reuses the payload of output.x, but its scales (row) lie along the dimension which the output GEMM "
        "contracts, and grad_weight.x contracts the other; write second_copy, requantise or bf16 "
        "(precision.gemm.grad_weight.x: run.yaml:19)",
    ),
    "rows_and_delayed": (
        MINIMAL + "precision:\n  level: O1\n  recipe: rowwise\n"
        "  gemm: {output: {x: {scale_source: delayed}}}\n",
        "run.yaml:18: precision.gemm.output.x.granularity, precision.gemm.output.x.scale_source: "
        "granularity: row takes each scale from its own amax, but scale_source is delayed; write "
        "scale_source: current, or granularity: tensor",
    ),
    "resident_rows": (
        MINIMAL + "precision:\n  level: O1\n  recipe: rowwise\n  weights: fp8\n",
        "run.yaml:18: precision.weights, precision.gemm.output.w.granularity: weights: fp8 is written piece "
        "by piece with one scale from the amax of the whole, but output.w.granularity is row; write "
        "weights: compute, or a recipe with one scale per tensor",
    ),
    "resident_mse": (
        MINIMAL
        + "precision:\n  level: O2\n  gemm: {output: {w: {scale_source: mse}}, keep_w: second_copy}\n",
        "run.yaml:17: precision.weights, precision.gemm.output.w.scale_source: weights: fp8 is written "
        "piece by piece with one scale from the amax of the whole, but output.w.scale_source is mse; "
        "write weights: compute, or a recipe with one scale per tensor",
    ),
    "weights_at_rest_and_on_the_wire": (
        MINIMAL + "precision:\n  level: O3\n  weights: compute\n",
        "run.yaml:17: precision.traffic.weights, precision.weights: traffic.weights: fp8 sends the codes of "
        "weights that rest in FP8, but weights is compute; write traffic.weights: compute",
    ),
    "grad_weight_keep": (
        MINIMAL + "precision:\n  level: O1\n  gemm: {grad_weight: {fp8: false}}\n",
        "run.yaml:17: precision.gemm.keep_x, precision.gemm.grad_weight.fp8: grad_weight.fp8: false "
        "multiplies the unquantised input, but keep_x is same; write keep_x: bf16",
    ),
    "grad_weight_operand": (
        MINIMAL + "precision:\n  level: O1\n  recipe: rowwise_gw_hp\n"
        "  gemm: {grad_weight: {x: {margin: 1}}}\n",
        "run.yaml:18: precision.gemm.grad_weight.x.margin, precision.gemm.grad_weight.fp8: has no effect: "
        "precision.gemm.grad_weight.fp8 is false (preset precision.recipe=rowwise_gw_hp); remove it, or "
        "write precision.gemm.grad_weight.fp8=true (precision.gemm.grad_weight.x.margin=null takes back what "
        "a file sets)",
    ),
    "grad_weight_traffic": (
        MINIMAL + "precision:\n  level: O1\n  recipe: rowwise_gw_hp\n  traffic: {activations: fp8}\n"
        "parallel: {tp: 2}\n",
        "run.yaml:18: precision.traffic.activations, precision.gemm.grad_weight.fp8: traffic.activations: "
        "fp8 sends codes, but gemm.grad_weight.fp8: false multiplies unquantised values; write "
        "traffic.activations: compute",
    ),
    "heads": (
        changed("num_heads: 4", "num_heads: 5"),
        "run.yaml:4: model.hidden_size, model.num_heads: the width 64 is not a multiple of the "
        "number of heads 5; "
        "change one of them or set model.head_dim (model.num_heads: run.yaml:5)",
    ),
    "kv_heads": (
        with_line("model", "num_kv_heads: 3"),
        "run.yaml:2: model.num_kv_heads, model.num_heads: num_heads (4) must be a multiple of "
        "num_kv_heads (3) "
        "(model.num_heads: run.yaml:6)",
    ),
    "batch": (
        changed("micro_batch_size: 4", "micro_batch_size: 3"),
        "run.yaml:13: train.global_batch_size, train.micro_batch_size: global_batch_size (8) must be "
        "a multiple of "
        "micro_batch_size (3); nearest legal values: 6 or 9 (train.micro_batch_size: run.yaml:14)",
    ),
    "context": (
        with_line("model", "max_seq_len: 16"),
        "run.yaml:9: data.seq_length, model.max_seq_len: data.seq_length (32) is longer than "
        "model.max_seq_len (16) "
        "(model.max_seq_len: run.yaml:2)",
    ),
    "rope_scaling_learned": (
        with_line("model", "positions: learned\n  rope_scaling: {}"),
        "run.yaml:2: model.rope_scaling, model.positions: has no effect: model.positions is learned; remove "
        "it, or write model.positions=rope (model.rope_scaling=null takes back what a file sets)",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradiction_names_both_keys(name: str, tmp_path: Path) -> None:
    text, expected = CONTRADICTIONS[name]
    assert message_of(write(tmp_path, text)) == expected


def test_several_problems_are_listed_in_file_order_on_five_lines(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + "run: {seed: -1, nme: x}\nlogging: {interval: 0, wandb: {mode: of}}\ncheckpoint: {interval: x}\n"
    )
    message = message_of(write(tmp_path, changed("lr: 3e-4", "lr: 0") + text.removeprefix(MINIMAL)))
    lines = message.splitlines()
    assert [line.split(": ")[:2] for line in lines[:4]] == [
        ["run.yaml:10", "optimizer.lr"],
        ["run.yaml:15", "run.nme"],
        ["run.yaml:15", "run.seed"],
        ["run.yaml:16", "logging.interval"],
    ]
    assert lines[4] == (
        "... and 2 more problems: logging.wandb.mode (run.yaml:16), checkpoint.interval (run.yaml:17)"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "right.yaml")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"run:\n  name: x\xff\n")
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * 1_000_001)
    assert message_of(tmp_path / "absent.yaml") == (
        f"config file not found: absent.yaml; {tmp_path} holds folder.yaml, huge.yaml, latin.yaml, right.yaml"
    )
    assert message_of(folder) == "folder.yaml is a folder; name a config file (*.yaml)"
    assert message_of(latin) == "latin.yaml:2: not UTF-8 text (invalid start byte); save the file as UTF-8"
    assert message_of(huge) == "huge.yaml: larger than 1,000,000 bytes; this is not a config file"
    assert "cannot follow the path" in message_of(tmp_path / "a\0b.yaml")


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    from fp8train.config.resolve import load_config

    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    resolved = load_config(path)
    assert resolved.config.train.steps == 10
    assert resolved.origins["train.steps"].line == 12
