"""Kernels that compute parts of a model: those of attention that others wrote, Liger's, and products of grouped
rows.
"""
