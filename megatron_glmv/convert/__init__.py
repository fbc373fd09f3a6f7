"""Weights between Hugging Face folders and Megatron models or checkpoints, through one table of rules."""

import megatron_glmv.parallel  # noqa: F401  (chooses the platform before Megatron is imported)
