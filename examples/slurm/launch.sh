# Sourced by train.sbatch and rl.sbatch on the job's first node: check nodes, start ranks, watch, requeue. Bash and SLURM's
# commands only; what needs Python runs through `inside`, in the virtual environment or the container. `job` is what squeue and
# scontrol are to call this job.

say() { echo "glmv: $(date '+%F %T') $*"; }

# ---- where Python is -------------------------------------------------------------------------------------------------------

prepare_environment() {
    export PYTHONPATH="$GLMV_ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    container=() wrapper=()
    local venv="${GLMV_VENV:-$GLMV_ROOT/.venv}"
    case "${GLMV_IMAGE:-}" in
    "") [ -d "$venv/bin" ] && export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" ;;
    *.sif)
        wrapper=(apptainer exec)
        command -v nvidia-smi >/dev/null && wrapper+=(--nv)
        wrapper+=(--bind "$GLMV_ROOT,$PWD${GLMV_MOUNTS:+,$GLMV_MOUNTS}" --pwd "$PWD" "$GLMV_IMAGE")
        ;;
    *)
        container=(--container-image="$GLMV_IMAGE" --container-workdir="$PWD" --no-container-mount-home)
        container+=(--container-mounts="$GLMV_ROOT:$GLMV_ROOT,$PWD:$PWD${GLMV_MOUNTS:+,$GLMV_MOUNTS}")
        ;;
    esac
}

# Runs a command where Python is, on this node: directly, or as a step of its own where pyxis makes the container.
inside() {
    if [ ${#container[@]} -gt 0 ]; then
        srun --overlap --nodes=1 --ntasks=1 --nodelist="${SLURMD_NODENAME}" --cpu-bind=none "${container[@]}" "$@"
    else
        ${wrapper[@]+"${wrapper[@]}"} "$@"
    fi
}

glmv() { inside python -m megatron_glmv "$@"; }

# ---- what the job's folder keeps ---------------------------------------------------------------------------------------------

# What a later reader must know to repeat this launch. SLURM's variables hold no secrets; others are not written.
record_environment() {
    local file="$run/environment/$launch.txt"
    mkdir -p "$run/environment"
    {
        echo "launched   $(date -Is) as job $launch"
        echo "command    glmv $command ${words[*]}"
        echo "commit     $(git -C "$GLMV_ROOT" rev-parse HEAD 2>/dev/null || echo unknown)"
        echo "changed    $(git -C "$GLMV_ROOT" status --porcelain 2>/dev/null | wc -l) files"
        echo "image      ${GLMV_IMAGE:-none}"
        echo "modules    ${LOADEDMODULES:-none}"
        echo "system     $(uname -srm)"
        echo
        git -C "$GLMV_ROOT" diff HEAD 2>/dev/null
        echo
        env | grep -E '^(SLURM_|GLMV_|NCCL_|GLOO_|TORCH_|OMP_|UCX_|FI_|CUDA_|NVTE_)' | grep -viE '(token|secret|password|jwt|api_?key)[^=]*=' | sort
        echo
        inside python -m pip --disable-pip-version-check freeze 2>/dev/null | sed 's#://[^@/ ]*@#://#' || echo "no pip"
        echo
        inside nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    } >"$file"
    say "environment recorded in $file"
}

newest_step() {
    local file newest=0
    for file in "$run"/checkpoints/step_*/meta.json; do
        [ -e "$file" ] || continue
        file="${file%/meta.json}"
        newest="${file##*step_}"
    done
    echo "$((10#$newest))"
}

# Notes how an attempt ended; false when this job has made no progress over so many of them that another would not either.
note_and_may_go_on() {
    local step file="$run/logs/attempts.txt"
    step="$(newest_step)"
    echo "$SLURM_JOB_ID $launch.$attempt step $step $1" >>"$file"
    [ "$(grep "^$SLURM_JOB_ID " "$file" | tail -n "$give_up" | grep -c " step $step ")" -lt "$give_up" ] && return 0
    say "giving up: $give_up launches ended without a checkpoint newer than step $step; see $run/logs/errors.txt"
    return 1
}

# ---- nodes -----------------------------------------------------------------------------------------------------------------

# Nodes of the allocation that SLURM does not call down, one a line.
living_nodes() {
    local dead
    dead="$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -o '%N %T' | awk '$2 ~ /down|fail|\*$/ { print $1 }' | sort -u)"
    scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF -e "${dead:-/}"
}

joined() { paste -s -d, -; }

address_of() { scontrol show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p'; }

# A port below those that the system deals out, by job so that two jobs on a node do not meet, and free on this node.
free_port() {
    local try port
    for try in $(seq 0 199); do
        port=$((10000 + (SLURM_JOB_ID * 37 + ${SLURM_RESTART_COUNT:-0} * 7 + attempt + try * 101) % 20000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port" && return; }
    done
    return 1
}

# Chooses the nodes of this attempt into `chosen` and `spare` (commas), `fewest` and `port`; `excluded` are named in the requeue.
# False when too few are left.
choose_nodes() {
    local folder="$run/logs/$launch/preflight.$attempt" living options
    living="$(living_nodes | joined)"
    if [ -z "$living" ]; then return 1; fi
    [ "$living" = "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | joined)" ] || say "SLURM calls nodes down; left are $living"
    mkdir -p "$folder"
    read -ra options <<<"${GLMV_PREFLIGHT:-}"
    if [ "${GLMV_PREFLIGHT:-}" = off ]; then
        options=(--unmeasured)
    else
        say "checking $(tr , '\n' <<<"$living" | wc -l) nodes"
        measure_nodes "$folder" "$living" ${options[@]+"${options[@]}"}
    fi
    glmv preflight "$folder" --judge "$living" --ranks-per-node "$ranks_per_node" --least "$min_nodes" --most "$max_nodes" \
        ${options[@]+"${options[@]}"} "${words[@]}"
    local code=$?
    excluded="$(cat "$folder/exclude.txt" 2>/dev/null)"
    [ $code = 0 ] || return 1
    { read -r chosen && read -r fewest && read -r port && read -r spare; } <"$folder/use.txt"
    # Without a check, the first node is this one.
    [ "$port" != 0 ] || port="$(free_port)"
}

# One step over all nodes; where SLURM cannot start it on one, again without that one.
measure_nodes() {
    local folder="$1" nodes="$2" log="$1/srun.txt" count failed round
    shift 2
    for round in 1 2 3; do
        count="$(tr , '\n' <<<"$nodes" | wc -l)"
        timeout --kill-after=10 $((preflight_s + 120)) srun --overlap --no-kill --kill-on-bad-exit=0 --wait=0 --nodes="$count" \
            --ntasks="$count" --ntasks-per-node=1 --cpu-bind=none --nodelist="$nodes" ${container[@]+"${container[@]}"} \
            ${wrapper[@]+"${wrapper[@]}"} python -m megatron_glmv preflight "$folder" --among "$nodes" \
            --ranks-per-node "$ranks_per_node" --timeout-s "$preflight_s" "$@" >"$log" 2>&1 &
        wait_for $!
        failed="$(sed -n 's/.*aunch.* failed on node \([^:]*\):.*/\1/p' "$log" | sort -u)"
        [ -n "$failed" ] || grep -q 'Unable to create step' "$log" || return
        # SLURM has ended the others' processes, too.
        say "SLURM cannot start a process on ${failed:-a node}: $(head -n 1 "$log")"
        nodes="$(living_nodes | grep -xF -f <(tr , '\n' <<<"$nodes") | grep -vxF -e "${failed:-/}" | joined)"
        rm -f "$folder"/*.node.json "$folder"/.pair*
        [ -n "$nodes" ] || return
    done
}

# ---- ranks -----------------------------------------------------------------------------------------------------------------

# Waits for a background process; SLURM's warnings come in between. When the time after a warning is nearly over, gives up.
# A file stop of this job's making is removed behind it; another's may be meant for a launch that this one is refused beside.
wait_for() {
    while kill -0 "$1" 2>/dev/null; do
        sleep 1 &
        wait $!
        [ -n "$warned" ] || continue
        # Again and again: ranks that are only starting take an earlier request for one that was not meant for them.
        kill -0 "$1" 2>/dev/null && : >"$run/stop"
        if [ $SECONDS -ge "$deadline" ]; then
            say "the ranks have not stopped in time; what the last checkpoint does not hold is lost"
            requeue
        fi
    done
    wait "$1"
}

# SLURM's own words for the time that is left, in seconds: D-HH:MM:SS, MM:SS or a word.
seconds_left() {
    squeue -h -j "$job" -o %L | awk -F'[-:]' '
        /^[0-9:-]+$/ { n = split($0, p, /[-:]/); for (i = 1; i <= n; i++) s = s * ((i == 2 && /-/) ? 24 : 60) + p[i]; print s; next }
        { print 86400 }'
}

warn() {
    [ -z "$warned" ] || return 0
    warned="$1"
    local left
    left="$(seconds_left)"
    deadline=$((SECONDS + (left > 40 ? left - 20 : left / 2)))
    say "$1: ${left:-unknown} s are left; the ranks save and stop"
}

run_ranks() {
    local count
    count="$(tr , '\n' <<<"$chosen" | wc -l)"
    export GLMV_RANKS_PER_NODE="$ranks_per_node" GLMV_PORT="$port"
    export GLMV_AGENTS="$fewest:$count" GLMV_MAX_RESTARTS="${GLMV_MAX_RESTARTS:-3}"
    GLMV_HEAD="$(address_of "${chosen%%,*}")"
    export GLMV_HEAD
    say "starting $count x $ranks_per_node ranks on $chosen; logs in $GLMV_LOGS"
    local survive=()
    # SLURM ends the step when a node is lost, unless fewer nodes can go on by themselves.
    [ "$fewest" = "$count" ] || survive=(--no-kill)
    srun --overlap ${survive[@]+"${survive[@]}"} --kill-on-bad-exit=0 --wait=0 --nodes="$count" --ntasks="$count" \
        --ntasks-per-node=1 --cpu-bind=none --nodelist="$chosen" ${container[@]+"${container[@]}"} ${wrapper[@]+"${wrapper[@]}"} \
        bash "$GLMV_ROOT/examples/slurm/node.sh" "$command" "${words[@]}" ${served[@]+"${served[@]}"} &
    wait_for $!
    local code=$?
    [ -z "$warned" ] || rm -f "$run/stop"
    return $code
}

# Gives the job back to the queue, without the nodes that failed, and waits for the end.
requeue() {
    if [ "$(scontrol show job -o "$job" | grep -o 'JobState=[A-Z]*')" != JobState=RUNNING ]; then
        say "SLURM is ending this job itself"
        exit 1
    fi
    say "requeue${excluded:+, without $excluded}"
    trap '' TERM USR1
    [ -z "$warned" ] || rm -f "$run/stop"
    scontrol requeue "$job" || {
        say "SLURM does not requeue this job; submit it again: the run continues from step $(newest_step)"
        exit 1
    }
    # SLURM takes the list of nodes to avoid of a job that waits, which this one becomes within the seconds that it has left.
    local try
    for try in 1 2 3 4 5 6 7 8; do
        [ -n "$excluded" ] || break
        scontrol update JobId="$job" ExcNodeList="$excluded" && break
        sleep 0.5
    done
    sleep 120
    exit 1
}

# Whether the ranks ended because of a request in the run's folder, and not of a signal; wait_for writes none without a warning.
stopped_by_user() {
    grep '"kind": "stop"' "$run/events.jsonl" 2>/dev/null | tail -n 1 | grep -q 'stop asks for it'
}

# Servers beside the ranks: servers.sh has them.
start_servers() { :; }
stop_servers() { :; }
num_server_nodes=0 servers=() served=()

# ---- the whole -------------------------------------------------------------------------------------------------------------

glmv_launch() { # train | rl, FILE.yaml and overrides; %a in them is the index of an array's task
    command="$1"
    shift
    words=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
    launch="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    attempt=0 warned="" deadline=0 excluded="" run="" give_up="${GLMV_GIVE_UP:-3}"
    trap 'warn "time limit or preemption (USR1)"' USR1
    trap 'warn "preemption (TERM)"' TERM
    prepare_environment
    local tree code
    tree="$(glmv check "${words[@]}")" || exit 2
    run="$(sed -n 's/^run_folder: *//p' <<<"$tree" | head -n 1 | tr -d "\"'")"
    mkdir -p "$run/logs/$launch" || exit 1
    ranks_per_node="${GLMV_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
    max_nodes="${GLMV_NODES:-$((SLURM_JOB_NUM_NODES - num_server_nodes))}"
    min_nodes="${GLMV_MIN_NODES:-$max_nodes}"
    preflight_s="${GLMV_PREFLIGHT_S:-180}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > ranks_per_node ? SLURM_CPUS_ON_NODE / ranks_per_node : 1))}"
    say "job $launch on $SLURM_JOB_NODELIST: glmv $command ${words[*]}"
    record_environment
    while true; do
        if ! choose_nodes; then
            say "too few nodes can be used"
            note_and_may_go_on "too few nodes" || exit 1
            requeue
        fi
        [ -z "$warned" ] || requeue
        export GLMV_ID="$launch.$attempt" GLMV_LOGS="$run/logs/$launch/ranks.$attempt"
        mkdir -p "$GLMV_LOGS"
        if start_servers; then
            run_ranks
            code=$?
            stop_servers
        else
            code=1
        fi
        # What an earlier launch has left there says nothing of one that may not have started a rank.
        glmv status "$run" --exit-code --launch "$GLMV_ID"
        case $? in
        0)
            say "finished"
            exit 0
            ;;
        3) ;;
        *)
            summarize_errors
            say "failed for a reason that another start does not repair"
            exit 1
            ;;
        esac
        if [ $code != 0 ]; then summarize_errors; fi
        if [ -z "$warned" ] && [ $code = 0 ] && stopped_by_user; then
            say "stopped by glmv stop, and not requeued; submit it again to go on from step $(newest_step)"
            exit 3
        fi
        note_and_may_go_on "ended with $code${warned:+, $warned}" || exit 1
        if [ -n "$warned" ] || [ $code = 0 ]; then requeue; fi
        attempt=$((attempt + 1))
    done
}

summarize_errors() {
    glmv errors "$GLMV_LOGS" >"$run/logs/errors.txt" && head -n 60 "$run/logs/errors.txt"
}
