#!/usr/bin/env bash
# Builds, tests, checks and measures on this machine's GPU, in under nine minutes: `make gpu`.
#
#     bench/gpu.sh [build] [test] [sanitize] [bench] [--quick]      only these steps; one shape, fewer rounds
#
# It uses the Python that PYTHON names, installs nothing and needs no network. The output of each step is also in a
# log of its own in the folder LOGS (build/gpu); results go to bench/results/<gpu>.json, of a quick run to build/bench.
# A step that fails or hangs does not keep the others from running, except those that need the build; the exit code is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} logs=${LOGS:-build/gpu}
steps=() quick=() failed=()
for word; do
    case $word in
        build | test | sanitize | bench) steps+=("$word") ;;
        --quick) quick=(--quick) ;;
        *) sed -n '4s/^# *//p' "$0" >&2; exit 2 ;;
    esac
done
[ ${#steps[@]} -gt 0 ] || steps=(build test sanitize bench)
mkdir -p "$logs"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

run() { # run NAME SECONDS COMMAND...: unless the step was not asked for; pytest says what failed when it is interrupted
    local name=$1 seconds=$2
    shift 2
    [[ " ${steps[*]} facts " == *" ${name%%-*} "* ]] || return 0
    echo "==== $name (at most $seconds s)"
    timeout --signal INT --kill-after 5 "$seconds" "$@" 2>&1 | tee "$logs/$name.log" && return 0
    echo "==== $name: failed"
    failed+=("$name")
    return 1
}

finish() {
    ((${#failed[@]} == 0)) || { echo "failed: ${failed[*]} (logs in $logs)"; exit 1; }
    echo "all good in $SECONDS s (logs in $logs)"
    exit 0
}

nvidia-smi || true
capability='import torch; assert torch.cuda.is_available(), "torch finds no CUDA device"
print("{}.{}".format(*torch.cuda.get_device_capability()).replace("9.0", "9.0a"))'
run facts 20 "$python" -c "$capability" || finish
export TORCH_CUDA_ARCH_LIST=$(tail -1 "$logs/facts.log") MAX_JOBS=$(nproc)
run build 150 env LOWRANK_BUILD_CUDA=1 "$python" setup.py build_ext --inplace || finish
tests=(python_tests/test_{dequantize_4bit,quantize_4bit,double_quantize,linear_4bit,linear_4bit_dx}.py
    python_tests/test_{lora,multi_lora}_*.py python_tests/test_{bank,functional,nn_lora,cuda}.py)
workers=$("$python" -c 'import xdist; print("-n 4")' 2>/dev/null)
run test 120 env LOWRANK_TEST_DEVICE=cuda "$python" -m pytest -q --maxfail=30 -p no:cacheprovider $workers "${tests[@]}"
note=$(tail -1 "$logs/test.log" 2>/dev/null)
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || echo "compute-sanitizer was not found"
# Tiles that fit, a ragged one and blocks that cross rows, with rows for each family of kernels; all results are checked.
# Without torch's cache of memory, which would hide a step over a tensor's end.
for tool in ${sanitizer:+memcheck racecheck}; do
    run "sanitize-$tool" 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        --report-api-errors no --print-limit 10 "$python" -m lowrank_kernels bench --device cuda --hot --peers none \
        --op linear,dx,lora,training,multi_lora --shape 256x512,136x192,33x70 --m 1,5,17,128 --rank 20 --seconds 1e-6
done
[[ " ${failed[*]} " == *" test "* ]] && told=(--note "The tests before this run did not pass: $note") || told=()
run bench 180 "$python" -m bench --device cuda --budget 140 "${quick[@]}" "${told[@]}"
[ ${#quick[@]} -gt 0 ] || run bench-report 20 "$python" -m bench.report
finish
