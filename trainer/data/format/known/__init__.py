"""The formats of rows, a file a family, found by being here; trainer/data/format/row_format.py says what one is made
of.
"""
