#!/usr/bin/env bash
# Everything that reads the source without running it: ruff (rules, format), mypy, codespell, shellcheck, hadolint. Reports all, fails if one did.
set -euo pipefail

case "${1:-}" in
-h | --help)
    echo "usage: tools/lint.sh [--fix]    check the source; --fix lets ruff repair and format first"
    exit 0
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="${FP8TRAIN_VENV:-$PWD/.venv}/bin"
"$bin/python" -m ruff --version >/dev/null 2>&1 || {
    echo "lint: no ruff in $bin; run launch/setup.sh dev hf" >&2
    exit 2
}

if [ "${1:-}" = --fix ]; then
    "$bin/python" -m ruff check --fix --quiet . || true
    "$bin/python" -m ruff format --quiet .
fi

failed=()
check() {
    local name="$1" output
    shift
    if ! output="$("$@" 2>&1)"; then
        printf '%s\n' "--- $name" "$output"
        failed+=("$name")
    fi
}

check "ruff check" "$bin/python" -m ruff check .
check "ruff format (repair with: tools/lint.sh --fix)" "$bin/python" -m ruff format --check .
check "mypy" "$bin/python" -m mypy
check "codespell" "$bin/python" -m codespell_lib
mapfile -t scripts < <(find launch tools .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -path '.ci/run' \) | sort)
# Both come with the dev extra where there is a wheel for the machine.
outside() {
    local name="$1" program="$bin/$1"
    shift
    [ -x "$program" ] || program="$(command -v "$name" || true)"
    if [ -n "$program" ]; then
        check "$name" "$program" "$@"
    else
        echo "lint: $name is not installed; not checked: $*" >&2
    fi
}
outside shellcheck "${scripts[@]}"
outside hadolint Dockerfile

if [ "${#failed[@]}" -gt 0 ]; then
    (
        IFS=,
        echo "lint: failed: ${failed[*]}"
    )
    exit 1
fi
echo "lint: ok"
