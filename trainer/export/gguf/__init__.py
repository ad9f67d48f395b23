"""GGUF files for llama.cpp, and their proof by llama.cpp itself."""
