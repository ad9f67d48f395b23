"""Low-rank adapters of a mixture's experts, beside those of linear layers."""
