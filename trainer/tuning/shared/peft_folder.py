"""The names in PEFT's folder of an adapter. Without PEFT itself, which not every reader of such a folder needs."""

PREFIX = "base_model.model."  # of the weights' names: the wrapped model's
# The two files of PEFT's `save_pretrained`; PEFT loads nothing without the settings.
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
LABELS = "id2label.json"
"""Beside them where a head has learnt: the names of its outputs by their numbers, as transformers wants them."""
