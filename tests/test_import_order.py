"""The layering of the package, read from the import statements: no package and no module in a circle."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package may import only those before it (and itself).
ORDER = [
    *(
        "files",
        "json_text",
        "precision",
        "update_rules",
        "config",
        "extensions",
        "numerics",
        "kernels",
        "comm",
        "layers",
        "models",
    ),
    *(
        "parallel",
        "optim",
        "data",
        "checkpoint",
        "inference",
        "huggingface",
        "run_dir",
        "watch",
        "step",
        "deepspeed_engine",
    ),
    *("evaluation", "live", "planning", "training", "launch", "reporting", "cli"),
]


def imported_modules(path: Path) -> list[str]:
    """Dotted names of everything a file imports, inside functions too; relative imports resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [] if not node.level else list(package[: len(package) - node.level + 1])
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from fp8train.cli import app" imports a module, "from fp8train.cli.app import app" a name.
            for full in (f"{module}.{alias.name}" for alias in node.names):
                names.append(full if module == "fp8train" or _is_module(full) else module)
    return names


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def files_of(part: str) -> list[Path]:
    folder = ROOT / "fp8train" / part
    return [*folder.rglob("*.py"), *folder.parent.glob(f"{part}.py")]


def test_every_module_belongs_to_a_layer() -> None:
    parts = {
        p.stem if p.suffix == ".py" else p.name
        for p in (ROOT / "fp8train").iterdir()
        if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))
    }
    assert parts - set(ORDER) <= {"__init__", "__main__"}


@pytest.mark.parametrize("part", ORDER)
def test_imports_go_up_only(part: str) -> None:
    allowed = set(ORDER[: ORDER.index(part) + 1]) | {"__version__"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(part)
        for name in imported_modules(path)
        if name.split(".")[0] == "fp8train" and name.split(".")[1] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    """An import inside a function, or for types alone, closes a circle too: neither can be read without the
    other. That a module is in its package, whose ``__init__`` may import it, does not."""
    files = {path: path.relative_to(ROOT).with_suffix("") for path in (ROOT / "fp8train").rglob("*.py")}
    names = {path: ".".join(file.parts).removesuffix(".__init__") for path, file in files.items()}
    graph = {
        name: {other for other in imported_modules(path) if other in names.values() and other != name}
        for path, name in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_numerics_needs_only_torch() -> None:
    allowed = {"torch", "fp8train"} | sys.stdlib_module_names
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of("numerics")
        for name in imported_modules(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_precision_needs_nothing() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of("precision")
        for name in imported_modules(path)
        if name.split(".")[0] not in {"fp8train"} | sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_of_the_package_imports_the_tests() -> None:
    for path in (ROOT / "fp8train").rglob("*.py"):
        assert not [name for name in imported_modules(path) if name.split(".")[0] in ("tests", "tools")], path


@pytest.mark.parametrize(
    "name", ["cli", "config", "config.resolve", "launch", "training.preflight", "planning.summary"]
)
def test_reading_a_config_does_not_import_torch(name: str) -> None:
    code = f"import fp8train.{name}, sys; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "fp8train" / "data" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import torch, fp8train.config.schema as s\n"
        "from fp8train import cli\nfrom . import b\nfrom ..comm.x import y\n"
        "def f():\n    from fp8train.models.decoder import Decoder\n"
    )
    assert sorted(imported_modules(file)) == [
        "fp8train.cli",
        "fp8train.comm.x",
        "fp8train.config.schema",
        "fp8train.data",
        "fp8train.models.decoder",
        "torch",
    ]


def test_training_imports_no_compiler_and_no_checkpoints_before_it_needs_them() -> None:
    """They take longer than the rest of torch. A step in FP8 runs without them too."""
    code = """
import sys
import torch
import fp8train.training.run
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.config.resolve import resolve_mapping
from fp8train.step.trainer import Trainer
config = resolve_mapping({
    "model": {"family": "llama", "num_layers": 1, "hidden_size": 32, "num_heads": 2, "vocab_size": 64},
    "data": {"prefix": "none", "seq_length": 16}, "optimizer": {"lr": 0.01},
    "precision": {"level": "O2"},
    "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
}).config
trainer = Trainer(config, Processes(torch.device("cpu"), 1, 0, CountedGroup(None), None), vocab_size=64)
assert trainer.step(0, torch.randint(64, (1, 1, 17))).applied
slow = "torch._dynamo torch._inductor torch.distributed.tensor torch.distributed.checkpoint sympy"
print([name for name in slow.split() if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
