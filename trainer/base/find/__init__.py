"""Where the base is, whether it may be trained with these settings, and its tokenizer."""
