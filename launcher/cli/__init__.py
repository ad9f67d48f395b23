"""The `capstan` command."""
