"""The objectives that training minimises, one file or folder each. objective.py is their interface."""
