"""`capstan export` and `capstan push`."""
