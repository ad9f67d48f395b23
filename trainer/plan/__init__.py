"""The needs and the duration of a run, by arithmetic: parameters, memory, time, GPUs by name. No file here loads torch."""
