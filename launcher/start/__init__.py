"""The first steps of every start: claim the run's folder, and keep the code."""
