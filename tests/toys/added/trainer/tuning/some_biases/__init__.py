"""A toy method with a setting of its own: those of the base's biases learn that the setting names."""
