"""A row of documents, and the ranks that share it."""
