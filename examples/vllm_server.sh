#!/usr/bin/env bash
# One vLLM server for the rollouts of reinforcement learning (engine: {kind: vllm} in the run's YAML).
#
#     bash examples/vllm_server.sh MODEL_FOLDER [PORT] [more options of `vllm serve`]
#
# MODEL_FOLDER is the Hugging Face folder that the run starts from; its tokenizer and its limits of pictures and videos must be the
# run's. The weights in it are replaced by the run's own before the first answer. Runs until it is stopped. VLLM names the command
# where it is not on the path: VLLM=/env/bin/vllm. Several servers: one port each and, on GPUs, CUDA_VISIBLE_DEVICES each.
#
# GPUs:  CUDA_VISIBLE_DEVICES=0,1 bash examples/vllm_server.sh MODEL 8000 --tensor-parallel-size 2 --max-model-len 65536
# CPU:   bash examples/vllm_server.sh MODEL 8000 --dtype float32 --max-model-len 4096 --kv-cache-memory-bytes 1G
# Trainer on other machines: --host ADDRESS of this machine, in a network that nobody else reaches (see below).
# Trainer on the same GPUs' machine: leave it memory with --gpu-memory-utilization.
set -euo pipefail
model="${1:?usage: bash examples/vllm_server.sh MODEL_FOLDER [PORT] [options of vllm serve]}"
shift
port=8000
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    port="$1"
    shift
fi

# Opens the paths that pause the server, load weights and empty its caches. They ask for no password, not even with --api-key:
# keep --host at loopback, or behind a network that only the run's machines reach.
export VLLM_SERVER_DEV_MODE=1
# Nothing is fetched, nothing is reported, and its own processes talk over loopback.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP="${VLLM_HOST_IP:-127.0.0.1}"

options=(
    --host 127.0.0.1 --port "$port"
    --served-model-name policy           # `model` of the engine's configuration
    --enable-scale-out                   # the path that takes and gives token ids
    --logprobs-mode processed_logprobs   # of the sampling temperature; the default is of temperature 1
    --generation-config vllm             # no defaults from the folder, such as its temperature
    --limit-mm-per-prompt '{"image": 64, "video": 1}' # of one prompt; vLLM takes one video at most
)
if ! command -v nvidia-smi >/dev/null 2>&1; then
    # On a CPU. Compiling takes long and gains little; profiling pictures of the largest size takes minutes; threads that share
    # cores with the trainer are slower than one (OMP_NUM_THREADS=8 or so where the server has cores of its own).
    export VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCHDYNAMO_DISABLE=1
    options+=(--enforce-eager --skip-mm-profiling --gpu-memory-utilization 0.2)
fi
exec "${VLLM:-vllm}" serve "$model" "${options[@]}" "$@"
