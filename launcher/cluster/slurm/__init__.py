"""A run as Slurm jobs."""
