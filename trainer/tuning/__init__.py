"""How a model is tuned: a method (a file or folder each; method.py is what each must say of itself) for an objective
(objective/).
"""

# The configuration is complete before any folder here is: it reads their settings, which are made of its sections.
import trainer.config  # noqa: F401
