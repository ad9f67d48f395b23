"""A search over settings on Ray Tune: which trial is next and which ends early (search.py), one trial (trial.py), and
its driver.
"""
