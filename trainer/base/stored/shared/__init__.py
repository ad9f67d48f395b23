"""Parts that several stored formats use, and that are no format themselves."""
