"""The objectives that training minimises, one file each; objective.py is the interface that each of them has."""
