#!/usr/bin/env bash
# Train on several processes of this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: [NPROC=N] launch/torchrun.sh CONFIG.yaml [section.key=value ...]

Runs `fp8train train` under torchrun on this machine. Continues an interrupted run (checkpoint.resume=auto) unless told otherwise.
Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save the run after the current step and end it with status 0; a second Ctrl-C ends it now.

environment:
  NPROC            processes (default: the number of NVIDIA GPUs, or 1)
  OMP_NUM_THREADS  CPU threads per process, unless run.threads is set (default: cores / NPROC)
TEXT
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
"")
    usage >&2
    exit 2
    ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${FP8TRAIN_VENV:-$root/.venv}/bin/python"
[ -x "$python" ] || python="$(command -v python3)"

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
nproc="${NPROC:-$((gpus > 0 ? gpus : 1))}"
if ! [[ "$nproc" =~ ^[1-9][0-9]*$ ]]; then
    echo "torchrun.sh: NPROC must be a positive number, not '$nproc'" >&2
    exit 2
fi
# torchrun would set 1 thread and print a banner about it.
threads=$(($(getconf _NPROCESSORS_ONLN) / nproc))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

config="$1"
shift
resume=(checkpoint.resume=auto)
for override in "$@"; do
    case "$override" in checkpoint.resume=*) resume=() ;; esac
done

# torchrun itself answers any signal with a traceback and status 1, and kills workers that need longer than 30 s to save. So it runs
# in a process group of its own, out of reach of the terminal, and signals go to its children: they save and end with 0, as it then does.
set -m
"$python" -m fp8train.launch --nproc-per-node="$nproc" "$config" "${resume[@]}" "$@" &
torchrun=$!
set +m

# shellcheck disable=SC2329  # called by the traps
forward() {
    local signal="$1" workers
    read -r -a workers <<<"$(cat "/proc/$torchrun/task/"*/children 2>/dev/null | tr '\n' ' ')"
    kill -s "$signal" "${workers[@]:-$torchrun}" 2>/dev/null || true
}
for signal in INT TERM USR1 USR2; do
    # shellcheck disable=SC2064  # the name is meant now
    trap "forward $signal" "$signal"
done
trap 'forward TERM' HUP

# wait returns early, with a status above 128, whenever a trap ran
while :; do
    status=0
    wait "$torchrun" || status=$?
    if [ "$status" -le 128 ] || ! kill -0 "$torchrun" 2>/dev/null; then
        break
    fi
done
exit "$status"
