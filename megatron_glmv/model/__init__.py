"""GLM-4.1V out of Megatron's layers: vision tower, merger and decoder, under any layout."""
