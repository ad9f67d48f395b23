"""Bases and exports in plain transformers, loaded whole or a layer at a time. Those in fewer bits are decoded."""
