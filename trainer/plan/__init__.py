"""The way from settings to a model on its ranks: what they name (resolve.py), whether it fits and how long it takes
(plan.py and others, without torch), and all of it put together (assemble.py)."""
