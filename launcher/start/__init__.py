"""What every start does first: claim the run's folder, keep the code."""
