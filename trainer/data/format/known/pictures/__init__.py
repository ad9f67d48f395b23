"""Conversations with pictures in them, in the forms of OpenAI, Hugging Face, LLaVA, LLaMA-Factory and ms-swift."""
