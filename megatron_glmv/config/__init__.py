"""Configuration: pydantic trees read from YAML; imports neither torch nor Megatron."""
