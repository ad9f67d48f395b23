"""The formats that rows are written in, and the messages that a chat template wants."""
