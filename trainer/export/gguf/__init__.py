"""GGUF files for llama.cpp, and the proof of them by llama.cpp itself."""
