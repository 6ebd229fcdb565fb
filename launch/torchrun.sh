#!/usr/bin/env bash
# Train on several processes of this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: [NPROC=N] launch/torchrun.sh [--debug] CONFIG.yaml [section.key=value ...]

Runs `fp8train train` under torchrun on this machine. Continues an interrupted run (checkpoint.resume=auto) unless told otherwise.
Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save the run after the current step and end it with status 0; a second Ctrl-C ends it now,
with status 130.

  --debug          torchrun's own output, and all tracebacks

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
threads=$(($(unset OMP_NUM_THREADS && nproc) / nproc)) # of the cores that this shell may use
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

debug=()
if [ "$1" = --debug ] && [ "$#" -gt 1 ]; then
    debug=(--debug)
    shift
fi
config="$1"
shift
resume=(checkpoint.resume=auto)
for override in "$@"; do
    case "$override" in checkpoint.resume=*) resume=() ;; esac
done

printf 'starting %s:' "$nproc process$([ "$nproc" -eq 1 ] || echo es)" && printf ' %s' "$config" "$@" && printf '\n'
# For the line that says how to continue.
printf -v FP8TRAIN_LAUNCHER '%s%q' "${NPROC:+NPROC=$NPROC }" "$0"
export FP8TRAIN_LAUNCHER

# torchrun itself answers any signal with a traceback and status 1, and kills workers that need longer than 30 s to save. So it runs
# in a process group of its own, out of reach of the terminal, and signals go to its children: they save and end with 0, as it then does.
set -m
"$python" -m fp8train.launch --nproc-per-node="$nproc" "${debug[@]}" "$config" "${resume[@]}" "$@" &
torchrun=$!
set +m

# What the traps below note. A process may be told only once it can listen: until its handlers are set, a signal would kill it.
asked=()
declare -A told=()
interrupted= # when the first Ctrl-C came, in microseconds
quitting=

# shellcheck disable=SC2329  # called by the traps
say() {
    echo "$@" 2>/dev/null || true # the terminal may be gone
}

workers() {
    cat "/proc/$torchrun/task/"*/children 2>/dev/null | tr '\n' ' ' || true
}

# Whether a process catches SIGTERM: signal 15 is bit 14 of the mask.
listens() {
    local mask
    mask="$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)" && [ -n "$mask" ] && ((0x$mask & 0x4000))
}

# Passes on what was asked for. Whether everyone has been told.
tell() {
    local signal worker
    for signal in "${asked[@]}"; do
        for worker in $(workers); do
            if [ -z "${told[$signal-$worker]:-}" ] && listens "$worker"; then
                kill -s "$signal" "$worker" 2>/dev/null || true
                told[$signal-$worker]=yes
            fi
        done
    done
    [ "${#told[@]}" -ge $((${#asked[@]} * nproc)) ]
}

# A second Ctrl-C: who listens ends by itself, who does not yet has nothing to lose, and torchrun ends after its children.
# shellcheck disable=SC2329  # called by the traps
quit() {
    local worker
    quitting=yes
    if [ -n "$(workers)" ]; then
        kill -s USR1 "$torchrun" 2>/dev/null || true # so that it knows why they end
    else
        kill "$torchrun" 2>/dev/null || true
    fi
    for worker in $(workers); do
        if listens "$worker"; then
            kill -s INT "$worker" 2>/dev/null || true
        elif [ -z "${told[INT-$worker]:-}" ]; then # or it has ended, but for the interpreter
            kill -s KILL "$worker" 2>/dev/null || true
        fi
    done
}

# shellcheck disable=SC2329  # called by the traps
ask() {
    local signal="$1" now="${EPOCHREALTIME/[.,]/}" seen
    if [ "$signal" = INT ]; then
        if [ -n "$interrupted" ] && ((now - interrupted >= 1000000)); then
            quit
            return
        fi
        interrupted="${interrupted:-$now}"
    fi
    for seen in "${asked[@]}"; do
        [ "$seen" != "$signal" ] || return 0
    done
    asked+=("$signal")
    if ! tell && [ "${#told[@]}" -eq 0 ]; then
        case "$signal" in
        INT) say "Ctrl-C: stopping before the first step; Ctrl-C once more: quit now" ;;
        *) say "SIG$signal: stopping before the first step" ;;
        esac
    fi
}
for signal in INT TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064  # the name is meant now
    trap "ask $signal" "$signal"
done

# wait returns early, with a status above 128, whenever a trap ran
while :; do
    until tell || ! kill -0 "$torchrun" 2>/dev/null; do
        sleep 0.2 || true
    done
    status=0
    wait "$torchrun" || status=$?
    if [ "$status" -le 128 ] || ! kill -0 "$torchrun" 2>/dev/null; then
        break
    fi
done
# Its own status again: it may have ended while a trap cut the wait short.
status=0
wait "$torchrun" || status=$?
[ -z "$quitting" ] || [ "$status" -le 128 ] || status=130
exit "$status"
