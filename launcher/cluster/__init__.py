"""The clusters that a run can be handed to: Ray's and Slurm's."""
