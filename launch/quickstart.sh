#!/usr/bin/env bash
# The main job from nothing: set up .venv, then text -> tokenizer -> dataset -> a small Llama trained in BF16 and with FP8 GEMMs.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
-h | --help)
    cat <<'TEXT'
usage: launch/quickstart.sh [OPTIONS]

Sets up .venv (first call: minutes), then runs tools/quickstart.py with OPTIONS. Safe to repeat.
Its own options: .venv/bin/python tools/quickstart.py --help
TEXT
    exit 0
    ;;
esac

venv="${FP8TRAIN_VENV:-$PWD/.venv}"
FP8TRAIN_VENV="$venv" launch/setup.sh
exec "$venv/bin/python" tools/quickstart.py "$@"
