"""The proof of an export: it predicts what the trained model predicts."""
