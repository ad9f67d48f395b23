"""From safetensors files, or the cache of a quantized base, to a sharded model."""
