#!/usr/bin/env bash
# What launch.sh runs once a node, through srun: one torchrun agent. Its logs: NODE/agent.log and a folder with the output of
# every rank. What the run's first rank says goes on to the job's output.
set -uo pipefail
# A preempting SLURM signals every process of a step. The ranks answer, by saving; the agents wait for them.
trap '' TERM USR1
folder="$GLMV_LOGS/${SLURMD_NODENAME:-node$SLURM_NODEID}"
mkdir -p "$folder"
[ "$SLURM_NODEID" = 0 ] && hosts=true || hosts=false
# A store for every start of the ranks: the agents' own would hand restarted ranks the addresses of dead ones (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
exec python -m torch.distributed.run \
    --nnodes "$GLMV_AGENTS" --nproc-per-node "$GLMV_RANKS_PER_NODE" --max-restarts "$GLMV_MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-id "$GLMV_ID" --rdzv-endpoint "$GLMV_HEAD:$GLMV_PORT" \
    --rdzv-conf "is_host=$hosts,join_timeout=${GLMV_JOIN_S:-300},last_call_timeout=${GLMV_LAST_CALL_S:-30}" \
    --signals-to-handle SIGINT --redirects 3 --tee 0:3 --log-dir "$folder" \
    -m megatron_glmv "$@" > >(tee -a "$folder/agent.log" | sed -un 's/^\[rank 0\] //p') 2>&1
