"""``python -m megatron_glmv`` is ``glmv``; the form that torchrun starts."""

from __future__ import annotations

from megatron_glmv.cli import main

# The guard matters: Megatron's checkpoint writer spawns processes, and those import this file again.
if __name__ == "__main__":
    raise SystemExit(main())
