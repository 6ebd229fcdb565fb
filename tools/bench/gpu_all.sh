#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in one run of at most nine minutes.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: tools/bench/gpu_all.sh [--out FOLDER] [--only "PART ..."] [--again] [--tiny]
                              [--limit PART=SECONDS]... [--pack FILE]

Runs the parts below one after the other, each with a time limit. Results are written into FOLDER as they come
(PART.json, PART.log; profile.txt), and a table is printed last. A part whose result is complete is skipped, so
a run that was cut short goes on when it is started again. One that fails does not stop the others.
Exit status: 0, or 1 if a part failed or has no complete result, or 2 for a wrong argument.

  tests      tests marked gpu
  kernels    every fused operation: equal to its reference, bytes per second
  gemm       GEMMs in BF16 and FP8 with their casts; from which size on FP8 wins
  step_8b    training steps at O0, with FP8 GEMMs alone, O1, O2, O3: Llama 8B, few layers
  profile    kernels, launches and host waits of one step at O2
  optimizer  every plan of optimizer states against a copy
  step_1b    as step_8b
  step_3b    as step_8b
  linear     one linear, beside torchao's float8 training
  step_graphs  only where --only names it: steps of few tokens with and without run.cuda_graphs
  predict    only where --only names it: counts the steps of step_* and profile, on a CPU, in advance;
             minutes, and no time limit. Their tables then show it beside what is measured.

  --out FOLDER          default runs/gpu_all
  --only "PART ..."     these parts
  --again               also what is complete
  --limit PART=SECONDS  another time limit
  --tiny                in miniature, on a CPU: shows that the script works, and nothing else
  --pack FILE           after every part, FOLDER as one .tar.gz

environment:
  PYTHON                interpreter (python3) with torch and what pyproject.toml requires
  GPU                   that predict counts for: a name in tools/bench/ceilings.py (H200)
TEXT
}

fail() {
    echo "gpu_all.sh: $1; see --help" >&2
    exit 2
}

declare -A limits=(
    [tests]=120 [kernels]=95 [gemm]=40 [step_8b]=75 [profile]=45 [optimizer]=25 [step_1b]=45 [step_3b]=50
    [linear]=40 [step_graphs]=60 [predict]=0
)
declare -A given=()
all="tests kernels gemm step_8b profile optimizer step_1b step_3b linear"
out=runs/gpu_all chosen=$all again=0 tiny=0 pack=""
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --again) again=1 ;;
    --tiny) tiny=1 ;;
    --out | --only | --limit | --pack)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case "$1" in
        --out) out=$2 ;;
        --only) chosen=$2 ;;
        --pack) pack=$2 ;;
        --limit)
            [[ $2 =~ ^([a-z0-9_]+)=([0-9]+)$ ]] || fail "--limit $2: expected PART=SECONDS"
            [ -n "${limits[${BASH_REMATCH[1]}]:-}" ] || fail "--limit $2: no such part"
            given[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
            ;;
        esac
        shift
        ;;
    *) fail "unknown argument $1" ;;
    esac
    shift
done
for part in "${!limits[@]}"; do
    if [ "$tiny" = 1 ]; then limits[$part]=240; fi # whatever else that machine does
    limits[$part]=${given[$part]:-${limits[$part]}}
done
for part in $chosen; do
    [ -n "${limits[$part]:-}" ] || fail "--only: no part $part"
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
[ -z "$pack" ] || pack=$(realpath "$pack")
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# the caching allocator would keep pieces that the next micro-batch does not fit into
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

missing=$("$python" - <<'PYTHON'
import importlib.util
names = "torch pydantic ruamel.yaml numpy safetensors typer rich pytest pytest_timeout hypothesis"
print(*(name for name in names.split() if importlib.util.find_spec(name.split(".")[0]) is None))
PYTHON
) || fail "$python does not run"
[ -z "$missing" ] || fail "$python lacks these packages: $missing"

llama=configs/llama/llama3_8b.yaml
shape_8b=()
shape_1b=(model.hidden_size=2048 model.num_heads=32 model.num_kv_heads=8 model.ffn_hidden_size=8192
    model.num_layers=16 model.tie_embeddings=true)
shape_3b=(model.hidden_size=3072 model.num_heads=24 model.num_kv_heads=8 model.ffn_hidden_size=8192
    model.num_layers=28 model.tie_embeddings=true)
variants=(O0 FP8 O1 O2 O3)
graphs=(run.cuda_graphs=true)

arguments_of() { # the script of a part and its arguments, in ${command[@]}
    local -a predictions=()
    if [ -e "$out/predict.$1.json" ]; then predictions=(--predictions "$out/predict.$1.json"); fi
    local -a sizes=(--config "$llama" --micro-batch 1 --seq 2048 8192 --layers 1 3)
    local -a times=(--memory "$([ "$1" = step_8b ] && echo 56 || echo 40)" --warmup 2 --steps 2 --rounds 3 --patience 2)
    local small=()
    if [ "$tiny" = 1 ]; then
        small=(--tiny --device cpu)
        sizes=(--tiny --device cpu --layers 1 2)
        times=(--threads 1 --turns 1)
        shape_8b=(model.vocab_size=512) variants=(O0 O2) graphs=() # which a CPU has not
        shape_1b=("${shape_8b[@]}") shape_3b=("${shape_8b[@]}")
    fi
    local rest=$((limits[$1] - 12)) # the process starts, and prints, outside of this time
    case "$1" in
    tests) command=(gpu_tests.py --device "$([ "$tiny" = 1 ] && echo cpu || echo cuda)") ;;
    kernels) command=(kernels.py --seconds "$rest" --patience $((240 * tiny + 12)) "${small[@]}") ;;
    gemm) command=(gemm.py --seconds "$rest" "${small[@]}") ;;
    step_8b) command=(train_step.py "${sizes[@]}" "${times[@]}" --seconds "$rest" --variants "${variants[@]}" -- "${shape_8b[@]}") ;;
    step_1b) command=(train_step.py "${sizes[@]}" "${times[@]}" --seconds "$rest" --variants "${variants[@]}" -- "${shape_1b[@]}") ;;
    step_3b) command=(train_step.py "${sizes[@]}" "${times[@]}" --seconds "$rest" --variants "${variants[@]}" -- "${shape_3b[@]}") ;;
    step_graphs)
        if [ "$tiny" = 0 ]; then sizes=(--config "$llama" --micro-batch 1 --seq 512 2048 --layers 4 8) times=(--warmup 4 --steps 5 --rounds 3 --turns 1); fi
        command=(train_step.py "${sizes[@]}" "${times[@]}" --seconds "$rest" --variants O0 O2
            --variant O0_graphs precision.level=O0 precision.gemm.fp8=false "${graphs[@]}"
            --variant O2_graphs precision.level=O2 "${graphs[@]}" -- "${shape_1b[@]}")
        ;;
    profile)
        if [ -e "$out/predict.step_8b.json" ]; then predictions=(--predictions "$out/predict.step_8b.json"); fi
        if [ "$tiny" = 0 ]; then sizes=(--config "$llama" --micro-batch 1 --seq 8192 --layers 1); fi
        command=(profile_step.py "${sizes[@]}" --warmup 2 --variants O2 --text "$out/profile.txt" -- "${shape_8b[@]}")
        ;;
    optimizer) command=(optimizer_step.py --device "$([ "$tiny" = 1 ] && echo cpu || echo cuda)") ;;
    linear) command=(linear.py --compile --seconds "$rest" "${small[@]}") ;;
    esac
    if [ "$tiny" = 1 ] && [ "$1" = optimizer ]; then command+=(--tiny); fi
    if [ "$tiny" = 1 ] && [ "$1" = linear ]; then command=(linear.py "${small[@]}"); fi
    command=("$python" "tools/bench/${command[0]}" --json "$out/$1.json" "${predictions[@]}" "${command[@]:1}")
}

is_complete() {
    [ "$again" = 0 ] && [ -f "$1" ] && grep -q '"complete": true' "$1"
}

predict() {
    local part gpu=${GPU:-H200}
    for part in step_8b step_1b step_3b; do
        if is_complete "$out/predict.$part.json"; then continue; fi
        arguments_of "$part"
        command=("${command[@]/$out\/$part.json/$out\/predict.$part.json}")
        echo "predict: $part on $gpu"
        "${command[@]:0:4}" --predict "$gpu" "${command[@]:4}" >"$out/predict.$part.log" 2>&1 ||
            { tail -n 5 "$out/predict.$part.log" >&2 && return 1; }
    done
}

status=0 measured=""
for part in $chosen; do
    if [ "$part" = predict ]; then
        predict || status=1
        continue
    fi
    measured+=" $part"
    if is_complete "$out/$part.json"; then
        echo "$part: complete already"
        continue
    fi
    arguments_of "$part"
    echo "$part: at most ${limits[$part]} s"
    started=$SECONDS
    printf '%q ' "${command[@]}" >"$out/$part.log"
    echo >>"$out/$part.log"
    rm -f "$out/$part.json" # of an earlier run: not to be taken for this one's
    timeout --kill-after=5 "${limits[$part]}" "${command[@]}" >>"$out/$part.log" 2>&1
    code=$?
    if [ "$code" != 0 ]; then
        status=1
        [ "$code" != 124 ] && [ "$code" != 137 ] || echo "$part: stopped at its limit of ${limits[$part]} s"
        tail -n 8 "$out/$part.log"
    fi
    echo "$part: $((SECONDS - started)) s, exit status $code"
    if [ -n "$pack" ]; then tar -czf "$pack.new" -C "$out" . && mv "$pack.new" "$pack"; fi
done

if [ -n "$measured" ]; then
    # shellcheck disable=SC2086  # a list of words
    "$python" tools/bench/gpu_table.py "$out" $measured || status=1
fi
exit "$status"
