#!/usr/bin/env bash
# Correctness and the full benchmark on a CUDA machine, in under eight minutes:
#     bash benchmarks/gpu.sh
# and on any machine, with toy sizes, through the same entry points:
#     FORETHOUGHT_DEVICE=cpu bash benchmarks/gpu.sh --tiny
# Results go to $OUT, else to benchmarks/results/: cuda.json and .png, correctness.json, gpu.log. Every part is a process
# of its own with a time limit and writes what it has as it goes, so that no part loses another's results.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
size=${1:-}
# A dry run proves nothing about time, and shares its machine.
patience=${size:+10}
export FORETHOUGHT_DEVICE=${FORETHOUGHT_DEVICE:-cuda} PYTHONUNBUFFERED=1
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out" || exit 1
log=$out/gpu.log
: >"$log" || exit 1
failed=()

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * ${patience:-1})) started=$SECONDS code
    shift 2
    echo "== $name, at most $limit s" | tee -a "$log"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - started)) s" | tee -a "$log"
    [ "$code" -eq 0 ] || failed+=("$name ($code)")
}

if ! "$python" -c "import sys, torch; sys.exit('$FORETHOUGHT_DEVICE' == 'cuda' and not torch.cuda.is_available())"; then
    echo "no CUDA device, or no torch in $python; for a dry run: FORETHOUGHT_DEVICE=cpu bash $0 --tiny" | tee -a "$log"
    exit 1
fi
part correctness 50 "$python" -m benchmarks.correctness $size --out "$out"
if "$python" -c "import pytest" 2>/dev/null; then
    tests=(tests/models/test_attention.py tests/models/test_decoder.py tests/models/test_logprobs.py)
    tests+=(tests/models/test_philox.py tests/models/test_rollout.py tests/checkpoints/test_parity.py)
    # Weights of real models have to be fetched.
    part tests 50 "$python" -m pytest -p no:cacheprovider -m "not smollm2" ${size:+--collect-only} "${tests[@]}"
fi
for limits in attention:50 steps:75 memory:25 rollouts:110 curves:70; do
    part "${limits%:*}" "${limits#*:}" "$python" -m benchmarks $size --only "${limits%:*}" --out "$out"
done
part report 15 "$python" -m benchmarks.report "$out/$FORETHOUGHT_DEVICE.json"
[ ${#failed[@]} -eq 0 ] && exit 0
echo "failed: ${failed[*]}" | tee -a "$log"
exit 1
