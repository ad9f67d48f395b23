"""The way from settings to a model on its ranks.

resolve.py finds what the settings name. plan.py and others, without torch, tell whether the run fits and how long it
takes. assemble.py puts the model together.
"""
