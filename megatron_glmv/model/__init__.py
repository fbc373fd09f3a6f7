"""GLM-4.1V out of Megatron's layers: vision tower, merger and decoder, under any layout."""

import megatron_glmv.parallel  # noqa: F401  (chooses the platform before Megatron is imported)
