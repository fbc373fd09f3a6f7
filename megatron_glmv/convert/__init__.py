"""Weights between Hugging Face folders and Megatron models or checkpoints, through one table of rules."""
