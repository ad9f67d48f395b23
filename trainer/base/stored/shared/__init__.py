"""Code that several stored formats share."""
