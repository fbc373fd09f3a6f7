"""What a run's folder holds, written by ranks and read by anyone who sees the disk: neither torch nor a process group."""
