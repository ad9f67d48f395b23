"""The first steps of every start: claim the run's folder, keep the code."""
