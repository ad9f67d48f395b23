"""The settings of the data, and the kinds of rows that they know."""
