#!/usr/bin/env bash
# Stages that follow each other, each submitted to start when the one before is finished:
#
#     bash examples/slurm/stages.sh --nodes 64 --gpus-per-node 8 -- examples/pretrain.yaml examples/long_context.yaml examples/sft.yaml
#
# What stands before -- are options of sbatch for all; a stage with options or overrides of its own is one word:
#
#     bash examples/slurm/stages.sh --gpus-per-node 8 -- "--nodes 64 -- examples/pretrain.yaml" "--nodes 8 -- examples/sft.yaml seed=2"
#
# A YAML file with prompts goes to rl.sbatch. A stage that requeues itself keeps its id, so the next one waits on; one that fails
# for good takes those behind it out of the queue. A job array would not do: its tasks do not wait for each other's success. Arrays
# are for runs beside each other: sbatch --array=1-3 ... train.sbatch examples/sft.yaml seed=%a run_folder=runs/sft_%a
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
options=() stages=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -gt 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2; }
shift
stages=("$@")
before=""
for stage in "${stages[@]}"; do
    own=()
    if [[ "$stage" == *" -- "* ]]; then
        read -ra own <<<"${stage%% -- *}"
        stage="${stage#* -- }"
    fi
    read -ra words <<<"$stage"
    batch=train.sbatch
    if grep -q '^prompts:' "${words[0]}"; then batch=rl.sbatch; fi
    after=()
    [ -z "$before" ] || after=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
    before="$(sbatch --parsable "${options[@]}" ${own[@]+"${own[@]}"} ${after[@]+"${after[@]}"} "$here/$batch" "${words[@]}")"
    before="${before%%;*}"
    echo "$before  ${words[*]}"
done
