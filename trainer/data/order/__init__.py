"""The order of an epoch as a pure function, and each rank's part of every step."""
