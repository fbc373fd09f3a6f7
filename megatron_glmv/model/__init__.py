"""The model, from Megatron layers: vision tower, merger and decoder."""
