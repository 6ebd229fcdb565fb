#!/usr/bin/env bash
# The tests, from nothing: set up .venv, lint, then run pytest, whose summary is the end of the output.
set -euo pipefail

case "${1:-}" in
-h | --help)
    cat <<'TEXT'
usage: launch/test.sh [PYTEST ARGUMENTS...]

Sets up .venv (first call: minutes), runs tools/lint.sh, then the CPU tests that are not marked slow or gpu.
Arguments go to pytest and may override that choice:  launch/test.sh -m "slow or not slow" tests/checkpoint

environment:
  FP8TRAIN_SKIP_LINT=1   only the tests
  FP8TRAIN_TEST_PROCESSES  test files that run at a time (2; 0: in one process, e.g. to debug or on a GPU)
  PYTHON, FP8TRAIN_VENV  see launch/setup.sh
TEXT
    exit 0
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export FP8TRAIN_VENV="${FP8TRAIN_VENV:-$PWD/.venv}"
launch/setup.sh dev hf

# Only for the tests that compare our data files with Megatron's own reader; they skip themselves where it is absent. Tried once.
if [ ! -e "$FP8TRAIN_VENV/.megatron-core" ]; then
    "$FP8TRAIN_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1 ||
        echo "test: megatron-core could not be installed; the tests that read its format with its own code will be skipped" >&2
    touch "$FP8TRAIN_VENV/.megatron-core"
fi

# Only for the tests that read Transformer Engine's sources, which install where it cannot run; likewise.
te_sources="$FP8TRAIN_VENV/share/transformer-engine"
if [ ! -e "$te_sources" ]; then
    "$FP8TRAIN_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$te_sources" transformer-engine==2.20.2 ||
        echo "test: transformer-engine could not be installed; the tests that read its sources will be skipped" >&2
    mkdir -p "$te_sources"
fi

# Only for the tests of engine: deepspeed; likewise. It compiles one small operator when it is first used.
if [ ! -e "$FP8TRAIN_VENV/.deepspeed" ]; then
    { "$FP8TRAIN_VENV/bin/python" -m pip install --quiet --disable-pip-version-check wheel "setuptools>=77" ninja &&
        "$FP8TRAIN_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8; } ||
        echo "test: DeepSpeed could not be installed; the tests of engine: deepspeed will be skipped" >&2
    touch "$FP8TRAIN_VENV/.deepspeed"
fi

status=0
if [ "${FP8TRAIN_SKIP_LINT:-0}" != 1 ]; then
    tools/lint.sh || status=$?
fi

# Distributed tests run several processes side by side: one thread each is fastest, and keeps results comparable.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Two files at a time: most tests wait for processes, and those that share fixtures are in one file.
"$FP8TRAIN_VENV/bin/python" -m pytest -m "not slow and not gpu" -n "${FP8TRAIN_TEST_PROCESSES:-2}" --dist loadfile "$@" || status=$?
exit "$status"
