"""The wire to model servers: requests to vLLM, and which adapters vLLM and SGLang take."""
