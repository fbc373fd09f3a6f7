"""Train the GLM-4.1V family of vision-language models with Megatron's 3D parallelism."""

__version__ = "0.1.0"
