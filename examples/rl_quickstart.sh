#!/usr/bin/env bash
# Reinforcement learning in small, on any CPU: the quickstart's model improves on five tasks by their rewards alone.
# Runs examples/quickstart.sh first where it has not been run. Leaves everything under runs/rl_quickstart/.
# Overrides go to the training: rl_quickstart.sh steps=50 seed=1
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$GLMV_ROOT"
[ -f runs/quickstart/summary.json ] || bash examples/quickstart.sh
exec python examples/rl_quickstart.py "$@"
