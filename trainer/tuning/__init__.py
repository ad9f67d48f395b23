"""How a model is tuned: a method (one file or folder each) trains it for an objective (objective/).

method.py is the interface of a method, and objective/__init__.py that of an objective.
"""

# Import the configuration first: it reads the settings of the folders here, which are made of its sections.
import trainer.config  # noqa: F401
