#!/usr/bin/env bash
# Everything that needs a GPU, in about twelve minutes on an H100: times, merging, sampling, precisions, compile, FSDP2.
#
#     bash benchmarks/gpu/all.sh OUT            # tables and logs go to OUT; PYTHON=... to choose an interpreter
#
# Each part has its own time limit and goes on when another fails; summary.txt says how each ended.
set -uo pipefail
out=$(mkdir -p "${1:?Say where the tables go: bash benchmarks/gpu/all.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
export PYTHONPATH="src:training:${PYTHONPATH:-}" HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
: >"$out/summary.txt"

part() { # seconds, name, command
    local began=$SECONDS code
    timeout "$1" "${@:3}" >"$out/$2.log" 2>&1
    code=$?
    echo "$2: code $code, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
}

train() { # seconds, name, launcher and options
    local name=$2
    part "$1" "train-$name" "${@:3}" training/train_perflow.py --config training/configs/miniature.yaml \
        "output_dir=$runs/$name" torch_compile=false buffer_size=1024 max_train_steps=200 checkpointing_steps=100 \
        $EXTRA
}

step="$python benchmarks/gpu/training_step.py --peak-tflops 989 --repeats 3"
part 200 merge_and_sample $python benchmarks/gpu/merge_and_sample.py --repeats 2 --out "$out"
part 40 scheduler_step $python benchmarks/scheduler_step.py --device cuda --dtype float16 --rounds 50
part 60 offload $python -m pytest -q -p no:cacheprovider -W default tests/pipelines/test_pipeline_features.py -k gpu
EXTRA="mixed_precision=fp16" train 60 fp16 $python
EXTRA="mixed_precision=bf16" train 60 bf16 $python
EXTRA="mixed_precision=bf16" train 60 fsdp2 $python -m accelerate.commands.launch \
    --config_file training/configs/accelerate/fsdp2.yaml --num_processes 1
part 60 step-sd15 $step --model sd15 --batch 16
part 60 step-sd15-fp16 $step --model sd15 --batch 16 --dtype float16
part 60 step-sd15-lora $step --model sd15 --batch 16 --lora-rank 64 --checkpointing
part 90 step-sdxl-lora $step --model sdxl --batch 8 --lora-rank 64 --checkpointing
EXTRA="mixed_precision=bf16 torch_compile=true" train 150 compiled $python
part 150 step-sd15-compiled $step --model sd15 --batch 16 --compile
{
    grep -h "^| model" "$out"/step-*.log | head -1
    echo "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    grep -h "^| sd" "$out"/step-*.log | awk '!seen[$0]++'
} >"$out/training_step.md"
tail -n 40 "$out/summary.txt" "$out/training_step.md" "$out"/train-*.log
