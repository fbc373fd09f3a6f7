#!/usr/bin/env bash
# What servers.sh runs once on a node that serves, through srun: its vLLM servers, GLMV_SERVER_GPUS devices each.
set -uo pipefail
read -ra options <<<"${GLMV_SERVER_OPTIONS:-}"
[ "$GLMV_SERVER_GPUS" -le 1 ] || options+=(--tensor-parallel-size "$GLMV_SERVER_GPUS")
model="${GLMV_SERVER_MODEL:?names the Hugging Face folder that the servers begin with}"
for server in $(seq 0 $((GLMV_SERVER_COUNT - 1))); do
    if command -v nvidia-smi >/dev/null; then
        export CUDA_VISIBLE_DEVICES
        CUDA_VISIBLE_DEVICES="$(seq -s, $((server * GLMV_SERVER_GPUS)) $((server * GLMV_SERVER_GPUS + GLMV_SERVER_GPUS - 1)))"
    fi
    port=$((GLMV_SERVER_PORT + server))
    {
        bash "$GLMV_ROOT/examples/vllm_server.sh" "$model" "$port" --host "$GLMV_SERVER_HOST" ${options[@]+"${options[@]}"}
        echo "glmv: the server of port $port has ended with $?"
    } &
done
wait # for all of them: the trainer leaves out one that has ended, and the others go on
