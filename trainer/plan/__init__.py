"""What a run needs and how long it takes, by arithmetic: parameters, memory, time, GPUs by name. It loads no torch."""
