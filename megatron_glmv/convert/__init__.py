"""Conversion between a Hugging Face folder and any parallel layout."""
