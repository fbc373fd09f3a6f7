# Sourced by rl.sbatch behind launch.sh: vLLM servers on nodes of their own, for as long as the ranks run.

num_server_nodes="${GLMV_SERVER_NODES:-0}"

# Starts the servers on the last of the spare nodes and waits until all answer; `served` are words for the stage.
start_servers() {
    served=()
    [ "$num_server_nodes" -gt 0 ] || return 0
    local nodes node address server per_node="${GLMV_SERVER_GPUS:-1}" first="${GLMV_SERVER_PORT:-8000}" addresses=() count
    if [ "$(tr , '\n' <<<"$spare" | grep -c .)" -lt "$num_server_nodes" ]; then
        say "too few nodes for $num_server_nodes nodes of servers"
        return 1
    fi
    nodes="$(tr , '\n' <<<"$spare" | tail -n "$num_server_nodes")"
    count=$((${SLURM_GPUS_ON_NODE:-1} / per_node))
    mkdir -p "$run/logs/$launch/servers.$attempt"
    export GLMV_SERVER_GPUS="$per_node" GLMV_SERVER_PORT="$first" GLMV_SERVER_COUNT="$count"
    for node in $nodes; do
        address="$(address_of "$node")"
        for server in $(seq 0 $((count - 1))); do addresses+=("http://$address:$((first + server))"); done
        GLMV_SERVER_HOST="$address" srun --overlap --kill-on-bad-exit=1 --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none \
            ${container[@]+"${container[@]}"} ${wrapper[@]+"${wrapper[@]}"} bash "$GLMV_ROOT/examples/slurm/serve_node.sh" \
            >"$run/logs/$launch/servers.$attempt/$node.log" 2>&1 &
        servers+=($!)
    done
    say "starting $((count * num_server_nodes)) servers on $(paste -s -d, - <<<"$nodes")"
    inside python -c '
import sys, time, urllib.request
end, left = time.time() + float(sys.argv[1]), sys.argv[2:]
while left and time.time() < end:
    try:
        urllib.request.urlopen(left[0] + "/health", timeout=5).read()
        left.pop(0)
    except OSError:
        time.sleep(1)
sys.exit(f"glmv: {left[0]} does not answer" if left else 0)' "${GLMV_SERVER_S:-1800}" "${addresses[@]}" &
    wait_for $! || { stop_servers && return 1; }
    served=("engine.addresses=[$(IFS=, && echo "${addresses[*]}")]")
}

stop_servers() {
    local process
    for process in ${servers[@]+"${servers[@]}"}; do kill "$process" 2>/dev/null; done
    for process in ${servers[@]+"${servers[@]}"}; do wait "$process"; done
    servers=()
}
