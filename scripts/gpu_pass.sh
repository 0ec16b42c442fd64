#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, parity on the device, speed, and a longer training of nano if there is
# time. Run from the repository root on a CUDA machine, inside the environment that has torch and this project:
#   scripts/gpu_pass.sh RESULTS [SETS] [STEPS] [ASSETS]
# RESULTS is the folder for logs and figures; SETS the training sets (scripts/build_nano_data.sh makes datasets/sets),
# STEPS how long stage 2 trains, the other stages in proportion; ASSETS a store of rendered assets
# (python -m data.sources.furniture), for the Gaussian decoder that stage 3 starts from. A step that hangs is ended
# after STEP_SECONDS (1200 if not set; 0: never) and counts as failed; training and what measures it may take any time.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:?usage: scripts/gpu_pass.sh RESULTS [SETS] [STEPS] [ASSETS]}
sets=${2:-}
steps=${3:-10000}
assets=${4:-}
mkdir -p "$results"
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name(0).replace(" ", "-").lower())') || exit 1
failed=0
limit=${STEP_SECONDS:-1200}

run() { # name, command...: keeps the log and goes on after a failure, so that one pass shows everything
    local name=$1
    shift
    echo "== $name: $*"
    local code=0
    timeout --kill-after=30 "$limit" "$@" >"$results/$name.log" 2>&1 || code=$?
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then
        echo "   ended after $limit s, see $results/$name.log"
    elif [ "$code" != 0 ]; then
        echo "   failed, see $results/$name.log"
    fi
    [ "$code" = 0 ] || failed=1
    tail -n 3 "$results/$name.log"
}

run tests python3 -m pytest tests/gpu -rs
# A lease may end early, so what the table of docs/fp8.md needs comes first.
run fp8-passes python3 -m benchmarks.fp8_passes --device cuda --out "$results/fp8-passes-$device.json"
native=(python3 -m benchmarks.training --device cuda --fp8 --compile --fp8-recipe delayed --fp8-backend triton --apart
    --engines native)
run training-so400m-c "${native[@]}" --model so400m-c --tokens 22528 --micro-batches 4 \
    --out "$results/training-so400m-c-$device.json"
run training-base "${native[@]}" --model base --tokens 65536 --micro-batches 2 \
    --out "$results/training-base-$device.json"
run parity python3 -m tokenizer.parity tests/golden --device cuda
run parity-bf16 python3 -m tokenizer.parity tests/golden --device cuda --dtype bfloat16
run speed python3 -m benchmarks.tokenizer --device cuda --out "$results/tokenizer-$device.json"
run speed-compiled python3 -m benchmarks.tokenizer --device cuda --dtype bf16 --batches 64 --compile --repeats 10 \
    --out "$results/tokenizer-compiled-$device.json"
run assets python3 -m benchmarks.assets --device cuda --out "$results/assets-$device.json"
run fp8 python3 -m benchmarks.fp8 --device cuda --out "$results/fp8-$device.json"
if python3 -c 'import torchao.float8' 2>/dev/null; then
    run fp8-compiled python3 -m benchmarks.fp8 --device cuda --compile --backend torchao \
        --out "$results/fp8-compiled-$device.json"
fi
run fp8-tiles python3 -m benchmarks.fp8_passes --device cuda --tiles --out "$results/fp8-tiles-$device.json"
run training-so400m-c-fast "${native[@]}" --model so400m-c --tokens 22528 --micro-batches 4 \
    --fp8-fast-accumulation all --out "$results/training-so400m-c-fast-$device.json"
for attention in varlen cudnn; do # on pictures of one size, which is what cuDNN's kernel takes
    run "training-so400m-c-$attention" "${native[@]}" --model so400m-c --tokens 22528 --micro-batches 4 --alike \
        --attention "$attention" --out "$results/training-so400m-c-alike-$attention-$device.json"
done
run training-base-engines python3 -m benchmarks.training --device cuda --apart --engines native megatron --model base \
    --tokens 32768 --out "$results/training-base-engines-$device.json"
if python3 -c 'import torch, transformer_engine.pytorch' 2>/dev/null; then
    run training-transformer-engine python3 -m benchmarks.training --device cuda --fp8 --fp8-recipe delayed --apart \
        --engines megatron --model base --tokens 32768 \
        --out "$results/training-base-transformer-engine-$device.json"
fi
run evaluation python3 -m benchmarks.evaluation --device cuda --out "$results/evaluation-$device.json"

stage() { # number, steps, key=value...: trains a stage of nano on $sets
    local number=$1 length=$2
    shift 2
    # Shards are named in a list, where key=value does not reach.
    sed "s#datasets/sets#$sets#" "configs/tokenizer/stages/nano-stage$number.yaml" >"$results/nano-stage$number.yaml"
    run "train-stage$number" python3 -m tokenizer.training.curriculum --config "$results/nano-stage$number.yaml" \
        --device cuda out="$results/nano-stage$number" steps="$length" precision=bf16 perceptual_images=8 \
        checkpoint.every=500 validation.every=500 log.pictures_every=2000 \
        data.workers="$workers" data.ahead=64 optimizer.warmup=100 optimizer.ema=0.998 optimizer.codes_lr_factor=0.05 \
        optimizer.refiner_lr_factor=4.0 "$@"
}

measure() { # name, options...: of the continuous model and the discrete one
    local name=$1
    shift
    run "measure-$name" python3 -m tokenizer.cli evaluate --device cuda --out "$results/nano-evaluation-$name" \
        --model "$results/nano-stage3/model" --model "$results/nano-stage4/model" "$@"
}

limit=0
if [ -n "$sets" ]; then
    # Tokens of a step: as many as 16 cores decode while a GPU computes, four to eight times those on a CPU.
    workers=$(($(nproc) > 4 ? $(nproc) - 2 : 2))
    fast=(optimizer.lr=6.0e-4 optimizer.plain_lr=1.0e-3)
    budgets=(data.budgets.image_understanding=1024 data.budgets.image_reconstruction=4096)
    stage 1 $((steps * 3 / 10)) "${fast[@]}" "${budgets[@]}"
    budgets+=(data.budgets.video_understanding=2048 data.budgets.video_reconstruction=2304)
    stage 2 "$steps" start.source="$results/nano-stage1" "${fast[@]}" "${budgets[@]}"
    gaussians=null
    if [ -n "$assets" ]; then
        gaussians=$results/nano-gaussians
        run train-gaussians python3 -m tokenizer.training.gaussian_trainer --device cuda \
            --config configs/tokenizer/nano-gaussians.yaml model="$results/nano-stage2/model" data="$assets" \
            out="$gaussians" steps="$steps" views=4
    fi
    budgets+=(data.budgets.asset_understanding=12288 data.budgets.asset_reconstruction=6144)
    stage 3 $((steps * 7 / 10)) start.source="$results/nano-stage2" start.gaussians="$gaussians" "${budgets[@]}"
    stage 4 $((steps * 3 / 10)) start.source="$results/nano-stage3" "${budgets[@]}"
    measure pictures --data packaged --preset nano --linear tests/linear_code.npz
    if [ -n "$assets" ]; then
        measure assets --data "$assets"
    fi
fi
exit $failed
