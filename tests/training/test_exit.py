"""A run leaves no thread behind for the interpreter to trip over when it ends."""

from __future__ import annotations

from pathlib import Path

from tests.training.launching import finish, start, write_config

# An exit handler runs after main() has asked to exit and before the interpreter is torn down.
PROGRAM = """
import atexit, glob
def tell():
    names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
    print("threads at exit:", sum("gloo" in name for name in names), "of gloo")
atexit.register(tell)
from fp8train.cli import main
main()
"""


def test_the_threads_of_gloo_have_ended_before_the_interpreter_does(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    overrides = ["train.steps=2", "train.eval_interval=0", "checkpoint.asynchronous=true"]
    output = finish(start(config, 2, *overrides, program=("-c", PROGRAM)))
    assert "threads at exit: 0 of gloo" in output
