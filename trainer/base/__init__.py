"""The base model: finding it, describing its parameters, and loading this rank's share of its stored bytes."""
