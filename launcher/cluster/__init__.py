"""The clusters that a run can be submitted to: Ray and Slurm."""
