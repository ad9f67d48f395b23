"""Turns a run's sources into compiled data sets, once for all runs that use them in the same way."""
