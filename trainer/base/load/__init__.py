"""Loads a sharded model from safetensors files, or from the cache of a quantized base."""
