"""A search over settings on Ray Tune.

search.py decides which trial is next and which ends early, trial.py runs one trial, and driver.py drives the search.
"""
