"""The losses of a pair, a file each, found by being here; trainer/tuning/objective/pairs/pair_loss.py says what one is
made of.
"""
