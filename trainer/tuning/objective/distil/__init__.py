"""Distillation from a stored teacher."""
