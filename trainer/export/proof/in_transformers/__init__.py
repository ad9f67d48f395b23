"""Bases and exports in plain transformers: loaded whole or a layer at a time, and decoded where they are in fewer
bits.
"""
