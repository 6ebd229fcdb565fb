#!/usr/bin/env bash
# Make .venv in the repository root and install fp8train into it, editable. Safe to repeat: a stamp holds a hash of what was asked
# for, and nothing is done while it matches. Run by quickstart.sh and test.sh; can be run alone.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/setup.sh [EXTRA...]

Creates .venv (Python >= 3.11) and installs fp8train with the given extras (dev, hf, eval, deepspeed, te),
editable. deepspeed and te are built beside the torch that is installed; te wants CUDA.
Without an NVIDIA GPU, torch is pinned by constraints/cpu.txt. A second call with nothing to do returns at once.

environment:
  PYTHON     interpreter that makes the environment (default: python3)
  FP8TRAIN_VENV
             where the environment lies (default: .venv in the repository root)
TEXT
}

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 2
}

check_python() {
    command -v "$python" >/dev/null || fail "no '$python' found; install Python 3.11 or newer, or set PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old; fp8train needs Python 3.11 or newer" "set PYTHON=/path/to/python3.11 (or newer)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "this Python cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"
}

# What the environment was made from, as a hash: place, interpreter, pins and package description.
fingerprint() {
    { "$python" --version && printf '%s\n' "$PWD" "${constraints[*]}" && cat pyproject.toml constraints/*.txt; } |
        sha256sum | cut -d' ' -f1
}

# An environment with extras serves a call that asks for none.
satisfied() {
    local stamps=("$venv/.installed-$label")
    if [ "$label" = base ]; then
        stamps=("$venv"/.installed-*)
    fi
    [ -x "$venv/bin/fp8train" ] && grep -qxs "$1" "${stamps[@]}"
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
esac
for extra in "$@"; do
    case "$extra" in
    dev | hf | eval | deepspeed | te) ;;
    *)
        usage >&2
        fail "unknown extra '$extra'"
        ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
venv="${FP8TRAIN_VENV:-$PWD/.venv}"
label="$(
    IFS=-
    echo "${*:-base}"
)"
check_python

constraints=(-c constraints/dev.txt)
if ! nvidia-smi --list-gpus >/dev/null 2>&1; then
    constraints+=(-c constraints/cpu.txt)
fi

wanted="$(fingerprint)"
if satisfied "$wanted"; then
    exit 0
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "could not create $venv"
target="."
if [ "$#" -gt 0 ]; then
    target=".[${label//-/,}]"
fi
echo "setup: installing fp8train $target into $venv (a minute or two, once)"
pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${constraints[@]}" "$@"
}
# Packages whose build looks at the torch that is there: what builds them comes first, then torch.
isolation=()
case " $* " in
*" deepspeed "* | *" te "*)
    if ! pip_install wheel "setuptools>=77" ninja || ! pip_install --editable .; then
        fail "pip could not install the dependencies"
    fi
    isolation=(--no-build-isolation)
    ;;
esac
pip_install "${isolation[@]}" --editable "$target" ||
    fail "pip could not install the dependencies; its messages are above" "a repeated call starts where this one stopped"
rm -f "$venv"/.installed-*
echo "$wanted" >"$venv/.installed-$label"
