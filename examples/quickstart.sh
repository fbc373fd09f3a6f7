#!/usr/bin/env bash
# The main job in small, on any CPU: real handwriting to packed rows, 2 x 2 ranks of training, a Hugging Face folder that reads.
# Sets up .venv if needed; leaves everything under runs/quickstart/. Overrides go to the training: quickstart.sh steps=50
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$GLMV_ROOT"
exec python examples/quickstart.py "$@"
