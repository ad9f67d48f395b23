"""The losses of a pair, a file each, found by being here; trainer/objective/pairs/pair_loss.py says what one is made of."""
