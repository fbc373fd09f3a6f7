"""Process groups, the platform under them, and our configuration as Megatron's."""
