"""The formats that bases are stored in, a file or a folder each, found by being here; trainer/base/base.py has the
class of all.
"""
