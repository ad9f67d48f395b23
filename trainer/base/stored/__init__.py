"""The formats in which bases are stored, one file or folder each. A format here is found without being listed anywhere.

Their interface is trainer/base/base.py.
"""
