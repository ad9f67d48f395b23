"""The verbs of `capstan`. A file in this folder is found by itself; launcher/cli/command.py describes its parts."""
