"""From a row to token ids, and which of them are trained."""
