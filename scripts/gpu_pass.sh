#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, parity on the device, speed, and a longer training of nano if there is
# time. Run from the repository root on a CUDA machine, inside the environment that has torch:
#   scripts/gpu_pass.sh RESULTS [STORE] [STEPS] [ASSETS]
# RESULTS is the folder for logs and figures; STORE a training store (python -m data.sources.nano), STEPS how long to train;
# ASSETS a store of rendered assets (python -m data.sources.furniture).
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:?usage: scripts/gpu_pass.sh RESULTS [STORE] [STEPS]}
store=${2:-}
steps=${3:-20000}
assets=${4:-}
mkdir -p "$results"
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name(0).replace(" ", "-").lower())') || exit 1
failed=0

run() { # name, command...: keeps the log and goes on after a failure, so that one pass shows everything
    local name=$1
    shift
    echo "== $name: $*"
    if ! "$@" >"$results/$name.log" 2>&1; then
        echo "   failed, see $results/$name.log"
        failed=1
    fi
    tail -n 3 "$results/$name.log"
}

run tests python3 -m pytest tests/gpu -rs
run parity python3 -m tokenizer.parity tests/golden --device cuda
run parity-bf16 python3 -m tokenizer.parity tests/golden --device cuda --dtype bfloat16
run speed python3 -m benchmarks.tokenizer --device cuda --out "$results/tokenizer-$device.json"
run assets python3 -m benchmarks.assets --device cuda --out "$results/assets-$device.json"
run fp8 python3 -m benchmarks.fp8 --device cuda --out "$results/fp8-$device.json"
run fp8-compiled python3 -m benchmarks.fp8 --device cuda --compile --backend torchao \
    --out "$results/fp8-compiled-$device.json"
run training python3 -m benchmarks.training --device cuda --fp8 --micro-batches 2 --out "$results/training-$device.json"
run evaluation python3 -m benchmarks.evaluation --device cuda --out "$results/evaluation-$device.json"
if [ -n "$store" ]; then
    run train python3 -m tokenizer.training --config configs/tokenizer/nano.yaml --device cuda \
        data="$store" out="$results/nano" steps="$steps" batch.images=128 batch.clips=24
    run train-d python3 -m tokenizer.training --config configs/tokenizer/nano-d.yaml --device cuda \
        data="$store" out="$results/nano-d" initialise="$results/nano/model" steps=$((steps / 3)) \
        batch.images=128 batch.clips=24
fi
if [ -n "$assets" ]; then
    run train-3d python3 -m tokenizer.training.gaussian_trainer --config configs/tokenizer/nano-gaussians.yaml \
        --device cuda data="$assets" out="$results/nano-gaussians" steps="$steps" views=4
    run measure-3d python3 -m tokenizer.evaluation.assets --model atoken-nano --device cuda \
        --gaussians "$results/nano-gaussians/gaussians" --data "$assets" --out "$results/nano-gaussians/evaluation"
fi
exit $failed
