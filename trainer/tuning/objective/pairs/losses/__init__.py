"""The losses of a pair, one file each. A file here is found without being listed anywhere.

Their interface is trainer/tuning/objective/pairs/pair_loss.py.
"""
