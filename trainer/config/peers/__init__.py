"""The settings of other tools for fine-tuning, a module a tool: which of ours each of their keys is, or why there is
none.
"""
