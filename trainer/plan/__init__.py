"""The way from settings to a model on its ranks: what the settings name (resolve.py), whether it fits and how long it
takes (plan.py and others, without torch), and its assembly (assemble.py).
"""
