"""Training: the loop, the step, the optimizer, checkpoints and metrics."""

import megatron_glmv.parallel  # noqa: F401  (chooses the platform before Megatron is imported)
