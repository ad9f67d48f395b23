"""The formats of rows, one file for each family. A file here is found without being listed anywhere.

Their interface is trainer/data/format/row_format.py.
"""
