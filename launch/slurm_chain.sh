#!/usr/bin/env bash
# Submit a run as a chain of Slurm jobs, one after the other, for runs that are longer than a queue's time limit. Each turn saves before
# its limit and the next one continues; what is left of the chain is cancelled when the run is done or cannot go on.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/slurm_chain.sh [--turns=N] [--mode=array|singleton] [--name=NAME] [--dry-run] [SBATCH FLAGS] CONFIG.yaml [section.key=value ...]

Submits launch/slurm.sbatch N times. At most one turn runs at a time. SBATCH FLAGS are written --flag=value and win over the file.

  launch/slurm_chain.sh --turns=6 --nodes=4 --time=12:00:00 --account=me configs/llama/llama2_7b.yaml run.name=first

  --turns=N [10]        turns at most
  --mode=MODE [array]   array: one job with N tasks, --array=1-N%1
                        singleton: N jobs of one name, --dependency=singleton, where the site has no or too small arrays
  --name=NAME           name of the jobs (default: fp8train-CONFIG; singleton: with the time behind it, since jobs of yours that
                        share a name wait for each other, and end together)
  --dry-run             print the commands, submit nothing

A turn ends the chain when the run is completed or stopped (Ctrl-C, an empty STOP file), failed with status 2, 3 or 4, or failed
otherwise no further than the turn before. After a node failure the next turn starts; jobs of a chain are not requeued.

environment: that of launch/slurm.sbatch (see its --help). Set for each turn: FP8TRAIN_CHAIN=MODE, FP8TRAIN_REQUEUES=0, and with
singleton FP8TRAIN_TURN, the number of the turn.
TEXT
}

fail() {
    printf 'slurm_chain.sh: %s\n' "$@" >&2
    exit 2
}

turns=10
mode=array
name=
dry=
flags=()
while [[ "${1:-}" == -* ]]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --turns=*) turns="${1#*=}" ;;
    --mode=*) mode="${1#*=}" ;;
    --name=*) name="${1#*=}" ;;
    --dry-run) dry=yes ;;
    --array | --array=* | -a*) fail "--array is set by --turns" ;;
    --dependency=* | -d*) fail "--dependency is what the chain is made of; leave it out" ;;
    --job-name=* | -J*) fail "--job-name is set by --name" ;;
    --)
        shift
        break
        ;;
    -[!-]*) fail "write $1 as the long flag, --flag=value" ;;
    *) flags+=("$1") ;;
    esac
    shift
done
[ "$#" -gt 0 ] || {
    usage >&2
    exit 2
}
[[ "$turns" =~ ^[1-9][0-9]*$ ]] || fail "--turns must be a positive number, not '$turns'"
case "$mode" in array | singleton) ;; *) fail "--mode must be array or singleton, not '$mode'" ;; esac
# `--nodes 2`: the 2 would be taken for the configuration.
if ! [[ "$1" =~ \.ya?ml$ || -f "$1" ]]; then
    if [ "${#flags[@]}" -gt 0 ]; then
        fail "'$1' is no configuration file" "write flags of sbatch as ${flags[-1]%%=*}=VALUE"
    fi
    fail "'$1' is no configuration file"
fi
if [ "$mode" = array ] && command -v scontrol >/dev/null; then
    most="$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')"
    if [ -n "$most" ] && [ "$turns" -ge "$most" ]; then
        fail "--turns=$turns: an array has at most $((most > 0 ? most - 1 : 0)) turns here (MaxArraySize $most)" \
            "ask for fewer, or for --mode=singleton"
    fi
fi

sbatch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/slurm.sbatch"
config="${1##*/}"
if [ -z "$name" ]; then
    name="fp8train-${config%.y*ml}"
    [ "$mode" = array ] || name+="-$(date +%Y%m%d-%H%M%S)"
fi

# Runs or prints a submission: its variables, then "--", then the flags that make the chain, then what the user gave.
submit() {
    local variables=()
    while [ "$1" != -- ]; do
        variables+=("$1")
        shift
    done
    shift
    local command=(sbatch --parsable --no-requeue --job-name="$name" "$@")
    if [ -n "$dry" ]; then
        printf -v line ' %q' "${variables[@]}" "${command[@]}"
        echo "${line# }"
    else
        echo "submitted $(env "${variables[@]}" "${command[@]}")"
    fi
}

variables=(FP8TRAIN_CHAIN="$mode" FP8TRAIN_REQUEUES=0)
if [ "$mode" = array ]; then
    submit "${variables[@]}" -- --array="1-$turns%1" "${flags[@]}" "$sbatch" "$@"
    exit
fi
for ((turn = 1; turn <= turns; turn++)); do
    submit "${variables[@]}" FP8TRAIN_TURN="$turn" -- --dependency=singleton "${flags[@]}" "$sbatch" "$@"
done
