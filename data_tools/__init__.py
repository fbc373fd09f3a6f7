"""Offline tools that make packed data sets; ``glmv-data <tool>``."""
