"""Which stored rows make up each parameter of the model."""
