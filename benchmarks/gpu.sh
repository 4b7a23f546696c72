#!/usr/bin/env bash
# Everything that only a CUDA machine can tell, in three parts of under nine minutes each:
#     bash benchmarks/gpu.sh            # all of them
#     bash benchmarks/gpu.sh 1          # the device and its ceilings; smoke test; correctness and the tests for CUDA
#     bash benchmarks/gpu.sh 2          # the rows with a target; profiles of a step
#     bash benchmarks/gpu.sh 3          # the rest of the benchmark, and the report
# and on any machine, with toy sizes, through the same entry points:
#     FORETHOUGHT_DEVICE=cpu bash benchmarks/gpu.sh --tiny [1|2|3]
# Results go to $OUT, else to benchmarks/results/, and once more in one file, gpu.tar.gz. Every section is a process of
# its own with a time limit and writes results as it goes, so a section that fails costs no other its results.
set -u
cd "$(dirname "$0")/.."
size= parts=
for argument; do
    case $argument in
        --tiny) size=--tiny ;;
        [123]) parts+=$argument ;;
        *) echo "usage: bash benchmarks/gpu.sh [--tiny] [1|2|3]" >&2; exit 2 ;;
    esac
done
parts=${parts:-123}
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
# A dry run is not timed and may share its machine, so it gets more time.
patience=${size:+10}
export FORETHOUGHT_DEVICE=${FORETHOUGHT_DEVICE:-cuda} PYTHONUNBUFFERED=1
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
# What was compiled for one section or part is there for the next.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/bench-results/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/bench-results/inductor}
mkdir -p "$out" || exit 1
log=$out/gpu.log
touch "$log" || exit 1
failed=()

report() { # NAME CODE SECONDS
    echo "== $1: exit code $2 after $3 s" | tee -a "$log"
    [ "$2" -eq 0 ] || failed+=("$1 ($2)")
}

section() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * ${patience:-1})) started=$SECONDS
    shift 2
    echo "== $name, at most $limit s" | tee -a "$log"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$log"
    report "$name" "${PIPESTATUS[0]}" $((SECONDS - started))
}

# Runs a section concurrently with others, for those that are not timed and mostly compile.
names=() pids=()
beside() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * ${patience:-1}))
    shift 2
    echo "== $name, concurrently, at most $limit s" | tee -a "$log"
    timeout -k 5 "$limit" "$@" >"$logs/$name" 2>&1 &
    names+=("$name") pids+=($!)
}

wait_for_all() {
    local i code started=$SECONDS
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        code=$?
        tee -a "$log" <"$logs/${names[$i]}"
        report "${names[$i]}" "$code" $((SECONDS - started))
    done
}

bench() { # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    section "$name" "$limit" "$python" -m benchmarks $size "$@" --out "$out"
}

if ! "$python" -c "import sys, torch; sys.exit('$FORETHOUGHT_DEVICE' == 'cuda' and not torch.cuda.is_available())"; then
    echo "no CUDA device, or no torch in $python; for a dry run: FORETHOUGHT_DEVICE=cpu bash $0 --tiny" | tee -a "$log"
    exit 1
fi
echo "== part $parts $size" | tee -a "$log"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

if [[ $parts == *1* ]]; then
    [ "$FORETHOUGHT_DEVICE" = cpu ] || section device 10 nvidia-smi -q -d CLOCK,POWER,PERFORMANCE,MEMORY
    section ceilings 40 "$python" -m benchmarks.device ceilings $size --out "$out"
    [ -n "$size" ] || section smoke 60 "$python" -m benchmarks.correctness --tiny --backend aten --out bench-results
    for backend in aten flash flex triton; do
        beside "correctness-$backend" 300 "$python" -m benchmarks.correctness $size --backend "$backend" --out "$out"
    done
    if "$python" -c "import pytest" 2>/dev/null; then
        tests=(tests/models/test_attention_cuda.py tests/models/test_pointwise_cuda.py tests/models/test_recorded.py)
        tests+=(tests/models/test_attention.py tests/models/test_decoder.py tests/models/test_rollout.py)
        tests+=(tests/models/test_logprobs.py tests/models/test_philox.py tests/checkpoints/test_parity.py)
        # Without the real models, whose weights would have to be downloaded.
        beside tests 300 "$python" -m pytest -p no:cacheprovider -m "not smollm2" ${size:+--collect-only} "${tests[@]}"
    fi
    wait_for_all
fi
if [[ $parts == *2* ]]; then
    bench targets 300 --only "attention:dense,attention:deep decode,steps:large"
    section profile 120 "$python" -m benchmarks.device profile $size --out "$out"
fi
if [[ $parts == *3* ]]; then
    rest=(attention:90 steps:100 memory:40 rollouts:100 curves:100)
    # A machine that only measures models may lack what reads data.
    "$python" -c "import pydantic, pyarrow" 2>/dev/null && rest+=(data:35)
    for limits in "${rest[@]}"; do
        bench "${limits%:*}" "${limits#*:}" --missing --only "${limits%:*}"
    done
    section report 20 "$python" -m benchmarks.report "$out/$FORETHOUGHT_DEVICE.json"
fi
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}" | tee -a "$log"
(cd "$out" && tar -czf gpu.tar.gz gpu.log $(ls ceilings.json correctness-*.json profile-*.txt cuda*.* cpu*.* 2>/dev/null))
[ ${#failed[@]} -eq 0 ]
