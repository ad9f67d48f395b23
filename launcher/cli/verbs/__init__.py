"""The verbs of `capstan`, found by being here; launcher/cli/command.py says what one is made of."""
