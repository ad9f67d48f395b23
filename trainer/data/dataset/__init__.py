"""The compiled data set: its manifest, its files, and verified reading of it."""
