"""The ways to fine-tune, one file each; method.py is what each of them must say of itself."""
