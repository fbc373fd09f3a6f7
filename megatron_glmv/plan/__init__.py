"""What a configuration will cost, told before it runs: memory, time and traffic as arithmetic, without torch."""
