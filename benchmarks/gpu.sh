#!/usr/bin/env bash
# Correctness and the full benchmark on a CUDA machine, in under eight minutes:
#     bash benchmarks/gpu.sh
# and on any machine, with toy sizes, through the same entry points:
#     FORETHOUGHT_DEVICE=cpu bash benchmarks/gpu.sh --tiny
# Results go to $OUT, else to benchmarks/results/: cuda.json and .png, a correctness-BACKEND.json each, gpu.log. Every part
# is a process of its own with a time limit and writes results as it goes, so a part that fails costs no other its results.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
size=${1:-}
# A dry run is not timed and may share its machine, so it gets more time.
patience=${size:+10}
export FORETHOUGHT_DEVICE=${FORETHOUGHT_DEVICE:-cuda} PYTHONUNBUFFERED=1
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out" || exit 1
log=$out/gpu.log
: >"$log" || exit 1
failed=()

report() { # NAME CODE SECONDS
    echo "== $1: exit code $2 after $3 s" | tee -a "$log"
    [ "$2" -eq 0 ] || failed+=("$1 ($2)")
}

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * ${patience:-1})) started=$SECONDS
    shift 2
    echo "== $name, at most $limit s" | tee -a "$log"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$log"
    report "$name" "${PIPESTATUS[0]}" $((SECONDS - started))
}

# Runs a part concurrently with others, for parts that are not timed and mostly compile.
names=() pids=()
beside() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * ${patience:-1}))
    shift 2
    timeout -k 5 "$limit" "$@" >"$logs/$name" 2>&1 &
    names+=("$name") pids+=($!)
}

wait_for_all() {
    local i code started=$SECONDS
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        code=$?
        echo "== ${names[$i]}, run concurrently" | tee -a "$log"
        tee -a "$log" <"$logs/${names[$i]}"
        report "${names[$i]}" "$code" $((SECONDS - started))
    done
}

if ! "$python" -c "import sys, torch; sys.exit('$FORETHOUGHT_DEVICE' == 'cuda' and not torch.cuda.is_available())"; then
    echo "no CUDA device, or no torch in $python; for a dry run: FORETHOUGHT_DEVICE=cpu bash $0 --tiny" | tee -a "$log"
    exit 1
fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
for backend in aten flash flex triton; do
    beside "correctness-$backend" 120 "$python" -m benchmarks.correctness $size --backend "$backend" --out "$out"
done
if "$python" -c "import pytest" 2>/dev/null; then
    tests=(tests/models/test_attention.py tests/models/test_decoder.py tests/models/test_logprobs.py)
    tests+=(tests/models/test_philox.py tests/models/test_rollout.py tests/checkpoints/test_parity.py)
    # Without the real models, whose weights would have to be downloaded.
    beside tests 120 "$python" -m pytest -p no:cacheprovider -m "not smollm2" ${size:+--collect-only} "${tests[@]}"
fi
wait_for_all
for limits in attention:75 steps:70 memory:20 rollouts:100 curves:60; do
    part "${limits%:*}" "${limits#*:}" "$python" -m benchmarks $size --only "${limits%:*}" --out "$out"
done
part report 15 "$python" -m benchmarks.report "$out/$FORETHOUGHT_DEVICE.json"
[ ${#failed[@]} -eq 0 ] && exit 0
echo "failed: ${failed[*]}" | tee -a "$log"
exit 1
