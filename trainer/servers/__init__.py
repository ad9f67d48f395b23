"""The wire to servers of models: what a vLLM is asked, and which adapters vLLM and SGLang take."""
