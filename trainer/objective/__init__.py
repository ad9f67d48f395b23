"""What training minimises, one file each; objective.py is what each of them must say of itself."""
