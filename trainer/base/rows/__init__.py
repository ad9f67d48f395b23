"""Finds out which stored rows make up each parameter of the model."""
