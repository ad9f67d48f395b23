"""Files on this machine: temporary folders, and the headers of safetensors files."""
