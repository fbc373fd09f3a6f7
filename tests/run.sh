#!/usr/bin/env bash
# Sets up .venv if needed, then: style, import floors, types, and the default tests (neither slow nor gpu) with those of SLURM.
# Arguments go to pytest: bash tests/run.sh -k grid;  bash tests/run.sh -m slow;  bash tests/run.sh -m slurm
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$GLMV_ROOT"
# One thread a process: the tests run several ranks at once, and small tensors gain nothing from more.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

failed=()
step() { # name, command...: run it, show its seconds, remember a failure and go on
    local name="$1" start=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "-- $((SECONDS - start)) s"
}

step "ruff check" python -m ruff check .
step "ruff format" python -m ruff format --check .
step "import floors" lint-imports --no-logo
step "mypy" python -m mypy
# Several files at a time; each stays in one process, whose fixtures it shares.
run=(python -m pytest -q -rs --durations=10 --dist loadfile --no-loadscope-reorder)
if [ $# -gt 0 ]; then
    step "pytest" "${run[@]}" -n 2 "$@"
else
    # With the shipped batch files under a real SLURM: installed where that is possible, else skipped with the reason.
    step "pytest" "${run[@]}" -n 3 -m 'not slow and not gpu and not vllm'
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: $(IFS=,; echo "${failed[*]}")"
    exit 1
fi
echo "all passed in $SECONDS s"
